// The parts of the program. Each ends it with a message where a result is wrong; what touches memory that it must not,
// the processor or the sanitizer ends.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

#define CFRT_REQUIRE(condition)                                                          \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                                \
        }                                                                                \
    } while (false)

void test_memory();    // every kernel of every level, on arrays that end at a guard page
void test_streams();   // the pool, and the engine on it: two streams at once
void mutant_heap();    // one row too many, behind a heap array
void mutant_guard();   // one row too many, behind a guarded array, at the best level
void mutant_signed();  // a sum that does not fit
void mutant_race();    // two threads, one result
