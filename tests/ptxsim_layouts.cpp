// Prints CuTe's layouts of matrix fragments: for each lane and value (or bit), the element it holds.
// Compiled and read by test_ptxsim_layouts.py.
#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm89.hpp>

using namespace cute;

template <class Layout>
void print(const char* atom, const char* part, Layout layout) {
    std::printf("%s %s", atom, part);
    for (int lane = 0; lane < int(size<0>(layout)); ++lane)
        for (int value = 0; value < int(size<1>(layout)); ++value) std::printf(" %d", int(layout(lane, value)));
    std::printf("\n");
}

template <class Atom>
void multiply(const char* name) {
    using Traits = MMA_Traits<Atom>;
    print(name, "A", typename Traits::ALayout{});
    print(name, "B", typename Traits::BLayout{});
    print(name, "C", typename Traits::CLayout{});
}

template <class Atom>
void load(const char* name) {
    using Traits = Copy_Traits<Atom>;
    print(name, "from", typename Traits::SrcLayout{});
    print(name, "to", typename Traits::DstLayout{});
}

int main() {
    multiply<SM80_16x8x16_F32BF16BF16F32_TN>("m16n8k16.row.col.f32.bf16.bf16.f32");
    multiply<SM80_16x8x16_F32F16F16F32_TN>("m16n8k16.row.col.f32.f16.f16.f32");
    multiply<SM80_16x8x16_F16F16F16F16_TN>("m16n8k16.row.col.f16.f16.f16.f16");
    multiply<SM80_16x8x32_S32S8S8S32_TN>("m16n8k32.row.col.s32.s8.s8.s32");
    multiply<SM89_16x8x32_F32E4M3E4M3F32_TN>("m16n8k32.row.col.f32.e4m3.e4m3.f32");
    multiply<SM89_16x8x32_F32E5M2E5M2F32_TN>("m16n8k32.row.col.f32.e5m2.e5m2.f32");
    multiply<SM89_16x8x32_F16E4M3E4M3F16_TN>("m16n8k32.row.col.f16.e4m3.e4m3.f16");
    load<SM75_U32x1_LDSM_N>("x1");
    load<SM75_U32x2_LDSM_N>("x2");
    load<SM75_U32x4_LDSM_N>("x4");
    load<SM75_U16x2_LDSM_T>("x1.trans");
    load<SM75_U16x4_LDSM_T>("x2.trans");
    load<SM75_U16x8_LDSM_T>("x4.trans");
}
