"""A PTX module with one entry, from the lines of its body: for tests, and for trying an instruction."""

_DECLARED = """
.reg .pred p<8>;
.reg .b16 h<8>;
.reg .b32 r<32>, tid, lane;
.reg .b64 q<16>;
.reg .f32 f<8>;
mov.u32 tid, %tid.x;
mov.u32 lane, %laneid;
"""


def snippet(*lines: str, parameters: int = 1, before: str = "") -> str:
    """Entry `k` with parameters p0, p1 ... of 64 bits, which are in registers q0, q1 ... when `lines` begin.

    Ready: registers p0-7 (predicates), h0-7, r0-31, q0-15, f0-7; tid and lane. `before`: declarations of the module.
    """
    given = ", ".join(f".param .u64 p{i}_" for i in range(parameters))
    loads = "\n".join(f"ld.param.u64 q{i}, [p{i}_];" for i in range(parameters))
    body = "\n".join(line if line in "{}" or line.endswith((";", ":")) else f"{line};" for line in lines)
    head = f".version 9.0\n.target sm_89\n.address_size 64\n{before}\n"
    return f"{head}.visible .entry k({given})\n{{{_DECLARED}{loads}\n{body}\nret;\n}}\n"
