/* Products of the feedback, in bytes: what an instruction set may do in its own way. */
#ifndef BSTACK_FEEDBACK_H
#define BSTACK_FEEDBACK_H

#include "kernels.h"

enum {
    TOGETHER = 64,                   /* columns of a group, and of a piece of those before it */
    TALL = 16,                       /* rows of a tile, of 64 bytes */
    DIGITS = 3,                      /* of a number, bytes from -128 to 127 */
    LEFT = TOGETHER / TALL,          /* tiles of a digit of a piece of the factor */
    RIGHT = 2,                       /* of a digit of a piece of what it is multiplied by */
    AT_ONCE = RIGHT * TALL,          /* rows of that */
    TILE = 1024,                     /* bytes of a tile */
    SUM = TALL * TALL,               /* sums of two tiles */
    LEVEL = LEFT * RIGHT * SUM,      /* of all tiles of a digit */
};

struct feedback {
    /* Add the products of `pieces` pieces. Tile t, of `tiles`, of piece p of the factor is at left + (t * step + p) * TILE: 64 signed bytes of
     * 16 columns; tile r of the other side at right + (p * RIGHT + r) * TILE: four neighbouring unsigned bytes of 16 rows, 16 times. Their
     * 16 x 16 sums are at sums + (t * RIGHT + r) * SUM. The next pieces of the right stand at
     * right_next; of the next ones of the left, at left_next, two lines of each row of 16 are to be fetched. */
    void (*products)(const int8_t *left, size_t step, int tiles, const int8_t *left_next, const uint8_t *right, const uint8_t *right_next,
                     int pieces, int32_t *sums);
    /* Look up OFFSET + the table value of rows, of any number up to the next multiple of 64. */
    void (*look_up)(const uint8_t *codes, int rows, uint8_t *values);
};

#endif
