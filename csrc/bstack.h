/* Arithmetic on matrices that stay packed: the functions that Python and other C code may call.
 *
 * A matrix of m rows (outputs) and n columns (inputs) is a stack of blocks, each the raw bytes of a chunk
 * (format/SPEC.md, section 6), at any address: no alignment is needed, and no byte past the block is read. The owner has
 * checked the parts of a block that say where to read: the order of an SpQR block's inputs, and the row pointer of outliers.
 *
 * Results are the same bits for every instruction set, number of threads and number of tokens in a call: sums are
 * exact integers, and the few float operations around them have one fixed order. Only the products for many tokens
 * (bstack_multiply_decoded, bstack_multiply_dense) differ between instruction sets, by rounding.
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

/* Compute y = x W^T with the rows of the blocks of some kinds, as bstack_decode_rows gives them, for many tokens: rows are decoded
 * and multiplied in single precision. y: tokens x rows, rows of y y_step floats apart; with `add` it is added to. A
 * token's results are the same bits whatever other tokens are in the call. Returns 0, or 1 when there is no memory. */
int bstack_multiply_decoded(const struct bstack_matrix *matrix, unsigned kinds, const float *x, int tokens, float *y, size_t y_step,
                            int add);

/* Do the same with a matrix of floats, rows x columns; steps are the floats from one row to the next. */
int bstack_multiply_dense(const float *w, size_t w_step, int rows, int columns, const float *x, size_t x_step, int tokens, float *y,
                          size_t y_step);

/* Decode rows of W itself, all kinds added up: out[k] = row index[k], count x columns. */
void bstack_lookup(const struct bstack_matrix *matrix, const int64_t *index, int count, float *out);

/* Compute (x * signs) H, in place, for each of `tokens` rows: the rotation of trellis blocks (SPEC.md). */
void bstack_rotate(float *x, int tokens, int columns);
/* Undo it: (x H) * signs. */
void bstack_unrotate(float *x, int tokens, int columns);

/* Exact chunks (SPEC.md), coded some rows at a time, from the first to the last. `stop` and `count` are those of decoding and of
 * counting; `low` and `escape` are followed by 4 bytes of the caller's. */
enum { BSTACK_CLASSES = 64 };
struct bstack_exact {
    int32_t columns, trailing;
    float *profile;                                             /* of each column; 1 before the first row */
    uint8_t *symbol[BSTACK_CLASSES], *stop[BSTACK_CLASSES];     /* the next symbol of each class, and the end of them */
    uint8_t *low, *escape;                                      /* low bits; escaped weights, one plane of bytes after the other */
    size_t bits, escapes, all_escapes;                          /* passed so far; escaped weights in all */
    size_t count[BSTACK_CLASSES];
};

/* Give the bits of `rows` rows of the original, in single precision, from their prediction p, as bstack_lookup gives it.
 * Returns 0, or 1 when a class has too few symbols. */
int bstack_exact_decode(struct bstack_exact *state, const float *p, const uint8_t *scales, int rows, uint32_t *out);
/* Code them; with a null `low` only count symbols, bits and escapes. `low` is zeros before the first row. */
void bstack_exact_encode(struct bstack_exact *state, const float *p, const uint8_t *scales, int rows, const uint32_t *w);

/* Quantise x ~ scale * code, |code| <= limit; columns values, rounded to nearest, ties to even. Returns the scale,
 * max |x| / limit: NaN (and codes 0) if a value is not finite, 0 (and codes 0) if all are below 1e-30. */
float bstack_quantise(const float *x, int columns, int limit, int16_t *code);

/* Run work(argument, part) for each part from 0 to parts - 1, side by side; returns when all are done.
 * Calls from two threads take turns; a call from inside `work` runs in its own thread. */
void bstack_parallel(void (*work)(void *argument, int part), void *argument, int parts);
/* Set the number of threads of bstack_parallel, the caller's included; 1 to 256. */
void bstack_set_threads(int threads);
int bstack_threads(void);

/* Name the instruction set in use: "portable", "neon", "avx2", "avx512bw", "avxvnni", "avx512", "amx"; the best of the CPU, until another is chosen.
 * bstack_use returns 0, 1 for an unknown name, 2 for a known one that this CPU or build does not have.
 * bstack_offers says the same without choosing it. */
const char *bstack_instructions(void);
int bstack_use(const char *name);
int bstack_offers(const char *name);

/* A decoder: root-mean-square norms, rotary positions, grouped queries, gated feed-forward. Norms and biases are float arrays.
 * All may be null but final_norm; a null norm changes nothing. With a null `key` (and `value`) the matrix `query` gives queries, keys
 * and values one after the other, and with a null `up` the matrix `gate` gives both. */
enum {
    BSTACK_PARTS = 256, /* matrices that make up the head, at most */
    BSTACK_SILU = 0,    /* activations of the gate */
    BSTACK_GELU = 1,    /* its approximation by tanh */
};

struct bstack_layer {
    const struct bstack_matrix *query, *key, *value, *out, *gate, *up, *down;
    const float *input_norm, *post_norm, *query_norm, *key_norm; /* post_norm: before the feed-forward */
    const float *attention_norm, *feed_norm;                     /* of what attention and feed-forward add */
    const float *query_bias, *key_bias, *value_bias, *out_bias, *gate_bias, *up_bias, *down_bias;
    /* Experts, where `gate` is null: of each the matrix for gate and up and that for down; the router is floats or packed. */
    const float *router;
    const struct bstack_matrix *packed_router, *const *expert_gate, *const *expert_down;
    int32_t window; /* attention sees so many tokens, the current one among them; 0: all */
    int32_t rope;   /* which of a token's rotary rows; -1: none */
};

struct bstack_decoder {
    int32_t width, inner, heads, key_heads, head_width, layers, head_parts;
    int32_t rotary;      /* values of a head that positions rotate, from its first */
    int32_t activation;  /* BSTACK_SILU or BSTACK_GELU */
    int32_t whole_norms; /* query_norm and key_norm are of all heads at once */
    int32_t experts, chosen, expert_inner; /* of a layer of experts, of a token, and width of one; all 0 without any */
    int32_t normalised;  /* what a token's experts count adds up to 1 */
    int32_t half;        /* the caches are of half precision, keys with tokens side by side; else single */
    int32_t page;        /* tokens of a page of the caches */
    float epsilon, scale; /* of the norms; of attention scores */
    float cap;            /* scores s become cap * tanh(s / cap); 0: they stay */
    const struct bstack_layer *layer;
    const float *final_norm;
    const struct bstack_matrix *const *head; /* row ranges, in order */
};

/* A text: its next token's position and rotary rows (each `rotary` floats), and its caches. The page p of layer l begins at
 * keys[l * pages + p]: key_heads x page x head_width, keys of half precision key_heads x head_width x page. */
struct bstack_text {
    int32_t position, pages;
    const float *cosine, *sine;
    void *const *keys, *const *values;
};

/* Floats of scratch memory for `count` tokens. */
size_t bstack_decoder_scratch(const struct bstack_decoder *decoder, int count);

/* Run one token of each text: x, their embeddings, count x width floats, is overwritten. Keys and values are written to the
 * caches at `position`, those before it are read. out: for each part of the head its logits, count x rows; without a head
 * the normalised x. A text's results are the same bits whatever other texts are in the call. Returns 0, or 1 when there is
 * no memory. */
int bstack_decoder_step(const struct bstack_decoder *decoder, const struct bstack_text *texts, int count, float *x, float *scratch,
                        float *out);

/* Run tokens of one text through one layer: x, count x width floats, in place. The texts differ by their positions alone, which
 * follow one another, and the rotary rows of these; the caches are of half precision. Returns as bstack_decoder_step. */
int bstack_decoder_read(const struct bstack_decoder *decoder, int layer, const struct bstack_text *texts, int count, float *x,
                        float *scratch);

#endif
