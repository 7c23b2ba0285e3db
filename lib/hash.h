/* hash.h - FNV-1a: for arrays that are compared but too long to send, and for names that become numbers. */
#ifndef USP_HASH_H
#define USP_HASH_H
#include <stddef.h>
#include <stdint.h>

uint64_t usp_hash(uint64_t seed, const void *bytes, size_t size);

/* Of the identity that this host's kernel made when it began. */
uint64_t usp_hash_boot(uint64_t seed);

#endif
