/* products.cpp - the arithmetic of one product of a warpgroup, and where tiles lie; see machine.h. */
#include "machine.h"

#include <cstring>

extern unsigned char memory[]; /* as kernels declare it */

namespace machine {

/* Where an element of a tile is in shared memory: its rows have 128 bytes and are swizzled, or 16 and are not. `inner`:
 * along the rows. */
static uint32_t address_of(uint64_t tile, int inner, int outer) {
    uint32_t base = (uint32_t)(tile & 0x3fff) << 4, slab = (uint32_t)(tile >> 16 & 0x3fff) << 4;
    uint32_t at = base + (uint32_t)(outer / 8) * ((uint32_t)(tile >> 32 & 0x3fff) << 4);
    bool swizzled = tile >> 62;
    if (!swizzled) return at + (uint32_t)(inner / 8) * slab + (uint32_t)(outer % 8) * 16 + (uint32_t)(inner % 8) * 2;
    at += (uint32_t)(inner / 64) * slab + (uint32_t)(outer % 8) * 128 + (uint32_t)(inner % 64) * 2;
    return at ^ (at >> 7 & 7) << 4;
}

static float element(const product &p, size_t shared, uint64_t tile, bool inner_is_other, int other, int k) {
    uint32_t at = address_of(tile, inner_is_other ? other : k, inner_is_other ? k : other);
    uint16_t word;
    if (at + 2 > shared) fail("a product reads behind shared memory");
    memcpy(&word, memory + at, 2);
    return p.decode(word);
}

/* The row and column of word i of thread t's sums. */
static int row_of(int t, int i) {
    return t / WARP * 16 + t % WARP / 4 + i / 2 % 2 * 8;
}

static int column_of(int t, int i) {
    return i / 4 * 8 + 2 * (t % 4) + i % 2;
}

static void read_left(const product (&of)[GROUP], size_t shared, float left[64][16]) {
    for (int t = 0; t < GROUP; t++)
        for (int i = 0; i < 8 && of[0].left; i++) {
            uint32_t pair = of[t].left[i / 2];
            left[row_of(t, i)][column_of(t, i)] = of[0].decode((uint16_t)(i % 2 ? pair >> 16 : pair));
        }
    for (int m = 0; m < 64 && !of[0].left; m++)
        for (int k = 0; k < 16; k++) left[m][k] = element(of[0], shared, of[0].left_tile, of[0].left_by_columns, m, k);
}

void multiply(const product (&of)[GROUP], size_t shared) {
    static float left[64][16], right[16][256], sums[64][256];
    const product &p = of[0];
    int columns = p.words * 2;
    read_left(of, shared, left);
    for (int n = 0; n < columns; n++)
        for (int k = 0; k < 16; k++) right[k][n] = element(p, shared, p.right_tile, p.right_by_columns, n, k);
    for (int t = 0; t < GROUP; t++)
        for (int i = 0; i < p.words; i++) sums[row_of(t, i)][column_of(t, i)] = p.add ? of[t].sums[i] : 0;
    for (int m = 0; m < 64; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < columns; n += 8)
                for (int i = 0; i < 8; i++) sums[m][n + i] += left[m][k] * right[k][n + i];
    for (int t = 0; t < GROUP; t++)
        for (int i = 0; i < p.words; i++) of[t].sums[i] = sums[row_of(t, i)][column_of(t, i)];
}

} /* namespace machine */
