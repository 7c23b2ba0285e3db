/* text.h - text that comes from elsewhere, before anybody sees it. */
#ifndef USP_TEXT_H
#define USP_TEXT_H
#include <stddef.h>

/* Puts '?' in the place of every byte that a terminal or a log might obey or choke on: control characters, and what is
 * not UTF-8. The text ends at its first 0, at the latest at the end of its room. */
void usp_text_clean(char *text, size_t room);

#endif
