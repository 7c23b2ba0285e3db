/* text.c - text that comes from elsewhere, before anybody sees it. */
#include "text.h"
#include <stdint.h>

/* How many bytes follow the first one of a character; -1: it begins none. */
static int followers(unsigned char first) {
    if (first < 0x80) return 0;
    if (first >= 0xc2 && first <= 0xdf) return 1;
    if (first >= 0xe0 && first <= 0xef) return 2;
    return first >= 0xf0 && first <= 0xf4 ? 3 : -1;
}

/* Neither controls (C0, DEL, C1; marks that turn the direction of writing) nor what UTF-8 may not hold. */
static int is_harmless(uint32_t character, int more) {
    static const uint32_t least[] = {0, 0x80, 0x800, 0x10000};
    if (character < 0x20 || (character >= 0x7f && character < 0xa0)) return 0;
    if ((character >= 0x202a && character <= 0x202e) || (character >= 0x2066 && character <= 0x2069)) return 0;
    if (character >= 0xd800 && character <= 0xdfff) return 0;
    return character >= least[more] && character <= 0x10ffff;
}

/* The bytes of the harmless character at the begin of the text; 0: there is none. */
static size_t character_at(const unsigned char *text) {
    int more = followers(text[0]);
    if (more < 0) return 0;
    uint32_t character = more == 0 ? text[0] : text[0] & (0x3fu >> more);
    for (int i = 1; i <= more; i++) {
        if ((text[i] & 0xc0) != 0x80) return 0; /* nor is the 0 at the end passed */
        character = character << 6 | (text[i] & 0x3fu);
    }
    return is_harmless(character, more) ? (size_t)more + 1 : 0;
}

void usp_text_clean(char *text, size_t room) {
    text[room - 1] = 0;
    for (unsigned char *at = (unsigned char *)text; *at;) {
        size_t length = character_at(at);
        if (length == 0) *at = '?';
        at += length ? length : 1;
    }
}
