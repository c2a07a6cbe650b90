// The C interface that engine.py calls. Layouts of the structs are those of machine.h.
#include <algorithm>
#include <string>

#include "lanes.h"

using namespace ptxsim;

namespace ptxsim {

std::unordered_map<std::string, Entry>& handlers() {
    static std::unordered_map<std::string, Entry> table;
    return table;
}

}  // namespace ptxsim

namespace {

std::vector<std::string>& names() {
    static std::vector<std::string> sorted = [] {
        register_arithmetic();
        register_conversions();
        register_memory();
        register_matrix();
        register_control();
        std::vector<std::string> found;
        for (const auto& [name, entry] : handlers()) found.push_back(name);
        std::sort(found.begin(), found.end());
        return found;
    }();
    return sorted;
}

}  // namespace

extern "C" {

struct Encoded {
    i32 handler, line, guard, negated, arg[6], first, count;
};
struct Constant {
    i32 slot, width;
    u64 bits;
};
struct Sizes {
    u32 registers, shared, dynamic_at, local, shared_grain, global_grain;
};

int ptxsim_handler_count() {
    return int(names().size());
}
const char* ptxsim_handler_name(int index) {
    return names()[std::size_t(index)].c_str();
}

const char* ptxsim_handler_widths(int index) {
    return handlers().at(names()[std::size_t(index)]).widths.c_str();
}

Program* ptxsim_program(const Encoded* code, int instructions, const Operand* operands, int operand_count,
                        const Constant* constants, int constant_count, const i32* special, int special_count,
                        const Sizes* sizes) {
    auto* program = new Program;
    program->operands.assign(operands, operands + operand_count);
    program->special.assign(special, special + special_count);
    program->registers.assign(std::size_t(sizes->registers) * kLanes, 0xff);
    program->shared = sizes->shared;
    program->dynamic_at = sizes->dynamic_at;
    program->local = sizes->local;
    program->shared_grain = sizes->shared_grain;
    program->global_grain = sizes->global_grain;
    for (int k = 0; k < constant_count; ++k)
        for (int l = 0; l < kLanes; ++l)
            std::memcpy(&program->registers[std::size_t(constants[k].slot * kLanes + l * constants[k].width)],
                        &constants[k].bits, std::size_t(constants[k].width));
    for (int k = 0; k < instructions; ++k) {
        const Encoded& from = code[k];
        const Entry& entry = handlers().at(names()[std::size_t(from.handler)]);
        Instruction to{entry.run,
                       entry.flow,
                       from.line,
                       from.guard,
                       from.negated,
                       {},
                       &program->operands[std::size_t(from.first)],
                       from.count,
                       k};
        std::copy(from.arg, from.arg + 6, to.arg);
        program->code.push_back(to);
    }
    return program;
}

void ptxsim_free(Program* program) {
    delete program;
}

// Runs a launch. counters: one per instruction, added to. Returns the findings, at most `room`, written to `findings`.
int ptxsim_launch(const Program* program, const Options* options, const u32* grid, const u32* threads,
                  u32 dynamic_shared, const void* parameters, int parameter_bytes, const Buffer* buffers,
                  int buffer_count, Counters* counters, Finding* findings, int room) {
    Launch launch{};
    launch.program = program;
    launch.options = *options;
    std::copy(grid, grid + 3, launch.grid);
    std::copy(threads, threads + 3, launch.threads);
    launch.dynamic_shared = dynamic_shared;
    const u8* bytes = static_cast<const u8*>(parameters);
    launch.parameters.assign(bytes, bytes + parameter_bytes);
    launch.buffers.assign(buffers, buffers + buffer_count);
    if (options->races)
        for (const Buffer& buffer : launch.buffers)
            launch.global_shadow.add(buffer.address, buffer.bytes, program->global_grain);
    launch.counters.assign(counters, counters + program->code.size());
    launch.random = options->seed * 0x9E37'79B9'7F4A'7C15 + 0x1234'5678'9ABC'DEF1;
    if (launch.random == 0) launch.random = 1;
    run_launch(launch);
    std::copy(launch.counters.begin(), launch.counters.end(), counters);
    const int found = std::min(int(launch.findings.size()), room);
    std::copy_n(launch.findings.begin(), found, findings);
    return found;
}
}
