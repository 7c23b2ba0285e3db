/* hash.c - SipHash-2-4 (Aumasson and Bernstein, 2012), and the kernel's identity by it. */
#define _GNU_SOURCE
#include "hash.h"
#include <fcntl.h>
#include <unistd.h>

/* ---- SipHash: four words, two rounds a word of the message, four at its end -------------------------------------- */

static uint64_t rotate(uint64_t word, int bits) {
    return word << bits | word >> (64 - bits);
}

static void mix(uint64_t v[4], int rounds) {
    for (int i = 0; i < rounds; i++) {
        v[0] += v[1], v[2] += v[3];
        v[1] = rotate(v[1], 13) ^ v[0], v[3] = rotate(v[3], 16) ^ v[2];
        v[0] = rotate(v[0], 32);
        v[2] += v[1], v[0] += v[3];
        v[1] = rotate(v[1], 17) ^ v[2], v[3] = rotate(v[3], 21) ^ v[0];
        v[2] = rotate(v[2], 32);
    }
}

static void absorb(uint64_t v[4], uint64_t word) {
    v[3] ^= word;
    mix(v, 2);
    v[0] ^= word;
}

/* Little-endian, the missing bytes 0. */
static uint64_t read_word(const unsigned char *bytes, size_t size) {
    uint64_t word = 0;
    for (size_t i = 0; i < size; i++) word |= (uint64_t)bytes[i] << (8 * i);
    return word;
}

uint64_t usp_hash_keyed(const usp_key *key, const void *bytes, size_t size) {
    const uint64_t low = read_word(key->bytes, 8), high = read_word(key->bytes + 8, 8);
    uint64_t v[4] = {low ^ UINT64_C(0x736f6d6570736575), high ^ UINT64_C(0x646f72616e646f6d),
                     low ^ UINT64_C(0x6c7967656e657261), high ^ UINT64_C(0x7465646279746573)};
    const unsigned char *at = bytes;
    for (size_t i = 0; i < size / 8; i++, at += 8) absorb(v, read_word(at, 8));
    absorb(v, (uint64_t)size << 56 | read_word(at, size % 8));
    v[2] ^= 0xff;
    mix(v, 4);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* ---- what is made of it ------------------------------------------------------------------------------------------ */

static void write_word(unsigned char bytes[8], uint64_t word) {
    for (int i = 0; i < 8; i++) bytes[i] = (unsigned char)(word >> (8 * i));
}

uint64_t usp_hash(uint64_t seed, const void *bytes, size_t size) {
    usp_key key = {{0}};
    write_word(key.bytes, seed);
    return usp_hash_keyed(&key, bytes, size);
}

usp_key usp_hash_key(const usp_key *parent, const void *bytes, size_t size) {
    usp_key key, other = *parent;
    for (size_t i = 0; i < sizeof other.bytes; i++) other.bytes[i] ^= 0xff;
    write_word(key.bytes, usp_hash_keyed(parent, bytes, size));
    write_word(key.bytes + 8, usp_hash_keyed(&other, bytes, size));
    return key;
}

uint64_t usp_hash_boot(uint64_t seed) {
    char text[64] = "";
    int file = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    if (file >= 0 && read(file, text, sizeof text - 1) < 0) text[0] = 0;
    if (file >= 0) close(file);
    return usp_hash(seed, text, sizeof text);
}
