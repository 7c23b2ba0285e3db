/* hash.h - SipHash-2-4: for arrays that are compared but too long to send, for names that become numbers, and, with a
 * key that others do not know, for proofs of knowing it. */
#ifndef USP_HASH_H
#define USP_HASH_H
#include <stddef.h>
#include <stdint.h>

typedef struct usp_key {
    unsigned char bytes[16];
} usp_key;

uint64_t usp_hash_keyed(const usp_key *key, const void *bytes, size_t size);
uint64_t usp_hash(uint64_t seed, const void *bytes, size_t size); /* by a key that everybody knows */

/* A key that is known to those alone who know `parent` and the bytes. */
usp_key usp_hash_key(const usp_key *parent, const void *bytes, size_t size);

/* Of the identity that this host's kernel made when it began. */
uint64_t usp_hash_boot(uint64_t seed);

#endif
