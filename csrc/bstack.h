/* Arithmetic on matrices that stay packed: the functions that Python and other C code may call.
 *
 * A matrix of m rows (outputs) and n columns (inputs) is a stack of blocks, each the raw bytes of a chunk
 * (format/SPEC.md, section 6), at any address: no alignment is needed, and no byte past the block is read. The owner has
 * checked the parts of a block that say where to read: the order of an SpQR block's inputs, and the row pointer of outliers.
 *
 * Results are the same bits for every instruction set, number of threads and number of tokens in a call: sums are
 * exact integers, and the few float operations around them have one fixed order.
 */
#ifndef BSTACK_H
#define BSTACK_H

#include <stddef.h>
#include <stdint.h>

enum {
    BSTACK_BLOCKS = 16, /* blocks of a stack, at most */
    BSTACK_RANK = 16,   /* rank of a sign block, at most */
    BSTACK_SIGN = 3,    /* kinds, by their codes in the container */
    BSTACK_TRELLIS = 4,
    BSTACK_SPQR = 5,
    BSTACK_OUTLIERS = 6,
    BSTACK_TRELLIS5 = 7,
};

/* A call reads `count` once, at its start, and only entries below it. So the owner may raise it while calls run, after it
 * has filled in the entries (calls that have begun ignore them). It may lower it, and change entries that were in use,
 * only while no call reads the matrix. */
struct bstack_matrix {
    int32_t rows, columns;
    int32_t count;               /* blocks in use, from the first; 0 is a matrix of zeros */
    uint8_t kind[BSTACK_BLOCKS];
    uint8_t rank[BSTACK_BLOCKS]; /* of sign blocks, 1 to BSTACK_RANK; of SpQR blocks, 16 (group / 16) + bits */
    const uint8_t *block[BSTACK_BLOCKS];
};

/* Compute y[k] = x W_k^T for matrices with the same number of columns, which share the rotation and quantisation of x.
 * x: tokens x columns; y[k]: tokens x rows of matrix k; row-major. Fast for few tokens (1 to 8).
 * A token that holds a NaN or an infinity (or overflows on the way) gives NaN in all its outputs.
 * Returns 0, or 1 when there is no memory (y is then undefined). */
int bstack_multiply(const struct bstack_matrix *const *matrices, int count, const float *x, int tokens, float *const *y);

/* Add up rows start to stop - 1 of the sum of the stack's blocks of some kinds (bit k: kind k): out, (stop - start) x columns.
 * BSTACK_TRELLIS and BSTACK_TRELLIS5: of the matrix that multiplies rotate(x).   All others: of the one that multiplies x. */
void bstack_decode_rows(const struct bstack_matrix *matrix, unsigned kinds, int start, int stop, float *out);

/* Decode rows of W itself, all kinds added up: out[k] = row index[k], count x columns. */
void bstack_lookup(const struct bstack_matrix *matrix, const int64_t *index, int count, float *out);

/* Compute (x * signs) H, in place, for each of `tokens` rows: the rotation of trellis blocks (SPEC.md). */
void bstack_rotate(float *x, int tokens, int columns);
/* Undo it: (x H) * signs. */
void bstack_unrotate(float *x, int tokens, int columns);

/* Quantise x ~ scale * code, |code| <= limit; columns values, rounded to nearest, ties to even. Returns the scale,
 * max |x| / limit: NaN (and codes 0) if a value is not finite, 0 (and codes 0) if all are below 1e-30. */
float bstack_quantise(const float *x, int columns, int limit, int16_t *code);

/* Run work(argument, part) for each part from 0 to parts - 1, side by side; returns when all are done.
 * Calls from two threads take turns; a call from inside `work` runs in its own thread. */
void bstack_parallel(void (*work)(void *argument, int part), void *argument, int parts);
/* Set the number of threads of bstack_parallel, the caller's included; 1 to 256. */
void bstack_set_threads(int threads);
int bstack_threads(void);

/* Name the instruction set in use: "portable", "neon", "avx2", "avx512"; the best of the CPU, until another is chosen.
 * bstack_use returns 0, 1 for an unknown name, 2 for a known one that this CPU or build does not have.
 * bstack_offers says the same without choosing it. */
const char *bstack_instructions(void);
int bstack_use(const char *name);
int bstack_offers(const char *name);

/* A decoder of the Llama family: root-mean-square norms, rotary positions, grouped queries, gated feed-forward. Norms and
 * biases are float arrays; query_norm, key_norm and all biases may be null. */
enum { BSTACK_PARTS = 256 }; /* matrices that make up the head, at most */

struct bstack_layer {
    const struct bstack_matrix *query, *key, *value, *out, *gate, *up, *down;
    const float *input_norm, *post_norm, *query_norm, *key_norm;
    const float *query_bias, *key_bias, *value_bias, *out_bias, *gate_bias, *up_bias, *down_bias;
    float *keys, *values; /* the cache: key_heads x capacity x head_width */
};

struct bstack_decoder {
    int32_t width, inner, heads, key_heads, head_width, layers, head_parts;
    float epsilon, scale; /* of the norms; of attention scores */
    const struct bstack_layer *layer;
    const float *final_norm;
    const struct bstack_matrix *const *head; /* row ranges, in order */
    float *scratch;                          /* as many floats as bstack_decoder_scratch says */
};

size_t bstack_decoder_scratch(const struct bstack_decoder *decoder, int capacity);

/* Run one token: x, its embedding, width floats, is overwritten; cosine and sine of its position, head_width floats each.
 * Its keys and values are written to the caches at `position`, those before it are read. logits: one for each row of the
 * head. Returns 0, or 1 when there is no memory. */
int bstack_decoder_step(const struct bstack_decoder *decoder, float *x, const float *cosine, const float *sine, int position,
                        int capacity, float *logits);

#endif
