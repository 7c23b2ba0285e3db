/* port.h - a place on this host for ranks to meet. */
#ifndef USP_TESTS_PORT_H
#define USP_TESTS_PORT_H

/* A port that was free a moment ago, as were the seven behind it. Ends the program where there is none. */
int usp_free_port(void);

#endif
