// C = A W^T of whole numbers, summed exactly, then scaled: value = sum * (scale of the row * scale of the column).

#include "dots.h"
#include "gemm_block.h"

namespace cfrt::CFRT_LEVEL {
namespace {

struct Exact : Whole {
    using Sum = std::int32_t;
#if CFRT_SIMD >= 1
    static constexpr std::int64_t kExact = 0;
    CFRT_INLINE static void put(Sum* to, Acc acc, bool) { istore(to, (Int)acc); }
#else
    static constexpr std::int64_t kExact = 1024;  // 127^2 * 1024 < 2^24: then the floats go to an integer
    CFRT_INLINE static void put(Sum* to, Vec acc, bool first) {
        const Int whole = __builtin_convertvector(acc, Int);
        istore(to, first ? whole : iadd(iload(to), whole));
    }
#endif

    // Scales and offsets are padded to whole panels.
    struct Column {
        const float* row_scale;
        Vec scale;
        Int offset;

        CFRT_INLINE Column(const Gemm& g, std::int64_t column)
            : row_scale(g.a_scale), scale(CFRT_LEVEL::load(g.w->scale + column)), offset(iload(g.w->offset + column)) {}

        CFRT_INLINE Vec plus(Vec bias, const Sum* sum, std::int64_t row) const {
            const Int whole = kInt8Offset ? isub(iload(sum), offset) : iload(sum);
            return fma(to_float(whole), CFRT_LEVEL::splat(row_scale[row]) * scale, bias);
        }
    };
};

}  // namespace

extern const GemmKernel gemm_int8;
constinit const GemmKernel gemm_int8{kPanel, Whole::kGroup, sizeof(Int8), kInt8Offset, tiles<Exact>, run<Exact>};

}  // namespace cfrt::CFRT_LEVEL
