/* The search of the encoder: what an instruction set may do in its own way. */
#ifndef BSTACK_ENCODE_H
#define BSTACK_ENCODE_H

#include "kernels.h"

enum { CODES = 4, STATES = 256, WINDOWS = STATES * CODES };

struct encoder {
    /* Run down the rows; return the cheapest last state. `back`, rows * STATES bytes, is what `oldest` reads. */
    int (*search)(const float *x, const float *weight, int rows, const float *table, uint8_t *back);
    /* The oldest code of the window that leads to a state after a row. */
    int (*oldest)(const uint8_t *back, int row, int state);
};

static inline int cheapest(const float *cost) {
    int state = 0;
    for (int s = 1; s < STATES; s++)
        if (cost[s] < cost[state]) state = s;
    return state;
}

#endif
