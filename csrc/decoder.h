/* What the parts of a decoder share: one layer that runs for some tokens. */
#ifndef BSTACK_DECODER_H
#define BSTACK_DECODER_H

#include "vectors.h"

struct places { /* in the scratch memory, for `count` tokens */
    float *normal, *query, *gate, *inner, *rotated, *chances, *share, *gathered, *added;
    int32_t *chosen;
};

struct pass { /* one layer for some tokens */
    const struct bstack_decoder *decoder;
    const struct bstack_layer *layer;
    const struct bstack_text *texts; /* of each token */
    int count, in_a_row;             /* the tokens are of one text, in a row */
    int rows;                        /* of the expert that runs */
    float *x, *key, *value, *up;
    size_t step, key_step, gate_step; /* floats from one token's queries, keys, gates to the next */
    struct places places;
};

/* Write a token's keys and values to their pages. */
void bstack_store(const struct pass *pass, const struct bstack_text *text, const float *key, const float *value);
/* Attend from each token's queries, which go to `normal`. Returns 0, or 1 when there is no memory. */
int bstack_attend(const struct pass *pass);

#endif
