// Convolutions 3x3 of stride 1 and padding 1 by Winograd's minimal filtering, float32, channels-last.
//
// A tile of T x T outputs, with N = T + 2: Y = A' [(G g G') * (B' d B)] A, where * stands for the product entry by entry,
// summed over the channels: N^2 products of matrices (tiles x channels in) (channels in x channels out). Lavin and Gray,
// "Fast Algorithms for Convolutional Neural Networks", 2016. Every output is computed by one sequence of operations,
// whatever block, row of a product or thread it falls into.
#include <stdlib.h>
#include <string.h>

#include "cpu.h"

namespace engine {
namespace ENGINE_SET {
namespace {

// ROWS x 2 vectors of sums, two of weights and one of an image fill the registers.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 14;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 6;
#else
constexpr int LANES = 4, ROWS = 6;
#endif
constexpr int PANEL = 2 * LANES;          // channels out that a product computes at once
constexpr int DEPTH = 16;                 // channels in whose weights are transformed at once
constexpr int PAD = 16;                   // floats behind a row and a matrix, so that they do not share a cache's sets
constexpr int64_t CACHED = 4 * 1024 * 1024;  // weights up to this many floats stay in the last cache
constexpr int64_t SMALL_BLOCK = 28, LARGE_BLOCK = 64;  // most tiles in a block, where they do and where they do not

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }

// Polynomials through 0, 1, -1 and infinity.
struct Tile2 {
    static constexpr int OUT = 2, IN = 4;
    static constexpr float B[IN][IN] = {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, -1, 0, 1}};
    static constexpr float G[IN][3] = {{1, 0, 0}, {.5f, .5f, .5f}, {.5f, -.5f, .5f}, {0, 0, 1}};
    static constexpr float A[OUT][IN] = {{1, 1, 1, 0}, {0, 1, -1, 1}};
};

// Through 0, P, -P, Q, -Q and infinity with P Q = 1: half the error of 1 and 2, since no power is large.
constexpr double Q = 1.4142135623730951, P = 1 / Q;
constexpr double P_NORM = 2 * P * P * (P * P - Q * Q), Q_NORM = 2 * Q * Q * (Q * Q - P * P);
constexpr float real(double x) { return static_cast<float>(x); }

struct Tile4 {
    static constexpr int OUT = 4, IN = 6;
    static constexpr float B[IN][IN] = {
        {1, 0, -2.5f, 0, 1, 0},
        {0, real(-Q), -2, real(P), 1, 0},
        {0, real(Q), -2, real(-P), 1, 0},
        {0, real(-P), -.5f, real(Q), 1, 0},
        {0, real(P), -.5f, real(-Q), 1, 0},
        {0, 1, 0, -2.5f, 0, 1},
    };
    static constexpr float G[IN][3] = {
        {1, 0, 0},
        {real(1 / P_NORM), real(P / P_NORM), real(P * P / P_NORM)},
        {real(1 / P_NORM), real(-P / P_NORM), real(P * P / P_NORM)},
        {real(1 / Q_NORM), real(Q / Q_NORM), real(Q * Q / Q_NORM)},
        {real(1 / Q_NORM), real(-Q / Q_NORM), real(Q * Q / Q_NORM)},
        {0, 0, 1},
    };
    static constexpr float A[OUT][IN] = {
        {1, 1, 1, 1, 1, 0},
        {0, real(P), real(-P), real(Q), real(-Q), 0},
        {0, .5f, .5f, 2, 2, 0},
        {0, real(P / 2), real(-P / 2), real(2 * Q), real(-2 * Q), 1},
    };
};

struct Call {
    const ConvArguments& given;
    int64_t padded;  // channels out, in whole panels
    int64_t tiles_high, tiles_wide, tiles, block;
    int status;
};

// out[i] = sum over j of matrix[i][j] in[j]. The matrix is known when this is compiled: its zeros and ones cost nothing.
template <int ROW_COUNT, int COLUMNS>
__attribute__((always_inline)) inline void combine(
    const float (&matrix)[ROW_COUNT][COLUMNS], const Vector* in, Vector* out, int out_step) {
#pragma GCC unroll 8
    for (int i = 0; i < ROW_COUNT; ++i) {
        Vector sum = {};
        bool first = true;
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; ++j) {
            if (matrix[i][j] == 0) continue;
            const Vector part = matrix[i][j] == 1 ? in[j] : matrix[i][j] * in[j];
            sum = first ? part : sum + part;
            first = false;
        }
        out[i * out_step] = sum;
    }
}

// ---------------------------------------------------------------- weights

// DEPTH x PANEL weights for each of the 9 places, from the channel in `depth` and the channel out `first`.
void gather(const ConvArguments& call, int64_t depth, int64_t first, float (&weights)[9][DEPTH][PANEL]) {
    const int64_t count = call.out < first + PANEL ? call.out - first : PANEL;
    if (count < PANEL) memset(weights, 0, sizeof weights);
    for (int place = 0; place < 9; ++place) {
        const int row = call.flip ? 2 - place / 3 : place / 3, column = call.flip ? 2 - place % 3 : place % 3;
        const float* from = call.weight + row * call.row_stride + column * call.column_stride +
                            depth * call.in_stride + first * call.out_stride;
        if (call.out_stride == 1) {
            for (int k = 0; k < DEPTH; ++k)
                for (int64_t o = 0; o < count; ++o) weights[place][k][o] = from[k * call.in_stride + o];
        } else {
            for (int64_t o = 0; o < count; ++o)
                for (int k = 0; k < DEPTH; ++k)
                    weights[place][k][o] = from[k * call.in_stride + o * call.out_stride];
        }
    }
}

// G g G' into (N^2, panels, channels in, PANEL).
template <typename Tile>
void transform_weights(int64_t begin, int64_t end, void* context) {
    constexpr int N = Tile::IN;
    const Call& call = *static_cast<const Call*>(context);
    const ConvArguments& given = call.given;
    float weights[9][DEPTH][PANEL];
    for (int64_t panel = begin; panel < end; ++panel)
        for (int64_t depth = 0; depth < given.in; depth += DEPTH) {
            gather(given, depth, panel * PANEL, weights);
            for (int k = 0; k < DEPTH; ++k)
                for (int lane = 0; lane < PANEL; lane += LANES) {
                    Vector half[N * 3], column[3], row[N];
                    for (int j = 0; j < 3; ++j) {
                        for (int i = 0; i < 3; ++i) column[i] = load(&weights[3 * i + j][k][lane]);
                        combine(Tile::G, column, half + j, 3);
                    }
                    for (int i = 0; i < N; ++i) {
                        combine(Tile::G, half + 3 * i, row, 1);
                        for (int j = 0; j < N; ++j) {
                            const int64_t place = (i * N + j) * call.padded + panel * PANEL;
                            store(given.transformed + place * given.in + (depth + k) * PANEL + lane, row[j]);
                        }
                    }
                }
        }
}

// ---------------------------------------------------------------- images

struct Position {
    int64_t sample, row, column;  // of a tile's first output
};

template <typename Tile>
Position position_of(const Call& call, int64_t tile) {
    const int64_t per_sample = call.tiles_high * call.tiles_wide, inside = tile % per_sample;
    return {tile / per_sample, inside / call.tiles_wide * Tile::OUT, inside % call.tiles_wide * Tile::OUT};
}

// B' d B of `count` tiles into (N^2, tiles, channels in).
template <typename Tile>
void transform_images(
    const Call& call, int64_t first, int64_t count, const float* zeros, float* to, int64_t plane, int64_t stride) {
    constexpr int N = Tile::IN;
    const ConvArguments& given = call.given;
    for (int64_t tile = 0; tile < count; ++tile) {
        const Position at = position_of<Tile>(call, first + tile);
        const float* pixels[N * N];
        for (int i = 0; i < N * N; ++i) {
            const int64_t row = at.row - 1 + i / N, column = at.column - 1 + i % N;
            const bool is_inside = row >= 0 && row < given.height && column >= 0 && column < given.width;
            const int64_t pixel = (at.sample * given.height + row) * given.width + column;
            pixels[i] = is_inside ? given.images + pixel * given.in : zeros;
        }
        for (int64_t k = 0; k < given.in; k += LANES) {
            Vector half[N * N], column[N], row[N];
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) {
#pragma GCC unroll 8
                for (int i = 0; i < N; ++i) column[i] = load(pixels[i * N + j] + k);
                combine(Tile::B, column, half + j, N);
            }
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) {
                combine(Tile::B, half + i * N, row, 1);
#pragma GCC unroll 8
                for (int j = 0; j < N; ++j) store(to + (i * N + j) * plane + tile * stride + k, row[j]);
            }
        }
    }
}

// A' m A, and the bias, of `count` tiles of (N^2, tiles, channels out).
template <typename Tile>
void transform_back(
    const Call& call, int64_t first, int64_t count, const float* from, int64_t plane, int64_t stride) {
    constexpr int N = Tile::IN, T = Tile::OUT;
    const ConvArguments& given = call.given;
    for (int64_t tile = 0; tile < count; ++tile) {
        const Position at = position_of<Tile>(call, first + tile);
        const int64_t rows = given.height - at.row, columns = given.width - at.column;
        float* to = given.result + ((at.sample * given.height + at.row) * given.width + at.column) * given.out;
        for (int64_t k = 0; k < given.out; k += LANES) {
            const Vector bias = given.bias ? load(given.bias + k) : Vector{};
            Vector half[T * N], column[N], row[T];
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) {
#pragma GCC unroll 8
                for (int i = 0; i < N; ++i) column[i] = load(from + (i * N + j) * plane + tile * stride + k);
                combine(Tile::A, column, half + j, N);
            }
#pragma GCC unroll 8
            for (int i = 0; i < T; ++i) {
                if (i >= rows) break;
                combine(Tile::A, half + i * N, row, 1);
#pragma GCC unroll 8
                for (int j = 0; j < T; ++j)
                    if (j < columns) store(to + (i * given.width + j) * given.out + k, row[j] + bias);
            }
        }
    }
}

// ---------------------------------------------------------------- products

// to (COUNT, VECTORS * LANES) = images (COUNT, depth) weights (depth, PANEL), of which it reads as many channels.
template <int COUNT, int VECTORS>
void multiply(
    int64_t depth, const float* images, int64_t stride, const float* weights, float* to, int64_t to_stride) {
    Vector sums[COUNT][VECTORS] = {};
    for (int64_t k = 0; k < depth; ++k) {
        Vector weight[VECTORS];
        for (int v = 0; v < VECTORS; ++v) weight[v] = load(weights + k * PANEL + v * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < COUNT; ++i) {
            const float image = images[i * stride + k];
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) sums[i][v] += image * weight[v];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i)
        for (int v = 0; v < VECTORS; ++v) store(to + i * to_stride + v * LANES, sums[i][v]);
}

using Multiply = void (*)(int64_t, const float*, int64_t, const float*, float*, int64_t);
template <int VECTORS>
constexpr Multiply MULTIPLY[] = {
    nullptr, multiply<1, VECTORS>, multiply<2, VECTORS>, multiply<3, VECTORS>, multiply<4, VECTORS>,
    multiply<5, VECTORS>, multiply<6, VECTORS>,
#if defined(__AVX512F__)
    multiply<7, VECTORS>, multiply<8, VECTORS>, multiply<9, VECTORS>, multiply<10, VECTORS>,
    multiply<11, VECTORS>, multiply<12, VECTORS>, multiply<13, VECTORS>, multiply<14, VECTORS>,
#endif
};

// Number of rows of the next product: ROWS, and of the last two half of what is left each.
int64_t next_rows(int64_t left) {
    if (left >= 2 * ROWS || left == ROWS) return ROWS;
    return left > ROWS ? (left + 1) / 2 : left;
}

template <typename Tile>
void compute_blocks(int64_t begin, int64_t end, void* context) {
    constexpr int PLACES = Tile::IN * Tile::IN;
    Call& call = *static_cast<Call*>(context);
    const ConvArguments& given = call.given;
    const int64_t in_stride = given.in + PAD, out_stride = given.out + PAD;
    const int64_t in_plane = call.block * in_stride + PAD, out_plane = call.block * out_stride + PAD;
    float* zeros = static_cast<float*>(
        aligned_alloc(64, sizeof(float) * (in_stride + PLACES * (in_plane + out_plane))));
    if (!zeros) {
        __atomic_store_n(&call.status, OUT_OF_MEMORY, __ATOMIC_RELAXED);
        return;
    }
    memset(zeros, 0, sizeof(float) * given.in);
    float *images = zeros + in_stride, *products = images + PLACES * in_plane;
    for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * call.block;
        const int64_t count = call.tiles - first < call.block ? call.tiles - first : call.block;
        transform_images<Tile>(call, first, count, zeros, images, in_plane, in_stride);
        for (int place = 0; place < PLACES; ++place)
            for (int64_t o = 0; o < call.padded; o += PANEL) {
                const float* weights = given.transformed + (place * call.padded + o) * given.in;
                const Multiply* multiply = given.out - o > LANES ? MULTIPLY<2> : MULTIPLY<1>;
                for (int64_t tile = 0, rows; tile < count; tile += rows) {
                    rows = next_rows(count - tile);
                    multiply[rows](
                        given.in, images + place * in_plane + tile * in_stride, in_stride, weights,
                        products + place * out_plane + tile * out_stride + o, out_stride);
                }
            }
        transform_back<Tile>(call, first, count, products, out_plane, out_stride);
    }
    free(zeros);
}

template <typename Tile>
int compute(const ConvArguments& given) {
    Call call{given, (given.out + PANEL - 1) / PANEL * PANEL, (given.height + Tile::OUT - 1) / Tile::OUT,
              (given.width + Tile::OUT - 1) / Tile::OUT, 0, 0, OK};
    call.tiles = given.batch * call.tiles_high * call.tiles_wide;
    if (call.tiles == 0) return OK;
    // As many blocks for each thread, and these as large as each other.
    const bool is_cached = Tile::IN * Tile::IN * given.in * call.padded <= CACHED;
    const int64_t round = given.threads * (is_cached ? SMALL_BLOCK : LARGE_BLOCK);
    const int64_t blocks = (call.tiles + round - 1) / round * given.threads;
    call.block = (call.tiles + blocks - 1) / blocks;
    if (!given.is_transformed) parallel_for(0, call.padded / PANEL, 1, transform_weights<Tile>, &call);
    parallel_for(0, (call.tiles + call.block - 1) / call.block, 1, compute_blocks<Tile>, &call);
    return call.status;
}

}  // namespace

int conv3x3(const ConvArguments& call) {
    return call.tile == Tile4::OUT ? compute<Tile4>(call) : compute<Tile2>(call);
}

}  // namespace ENGINE_SET
}  // namespace engine
