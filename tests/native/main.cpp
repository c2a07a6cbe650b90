#include <string>

#include "tests.h"

namespace {

struct Part {
    const char* name;
    void (*run)();
};

// A mutant is a mistake made on purpose: a run that does not stop at it proves nothing by stopping at nothing else.
constexpr Part kParts[] = {
    {"memory", test_memory},        {"streams", test_streams},        {"mutant-heap", mutant_heap},
    {"mutant-guard", mutant_guard}, {"mutant-signed", mutant_signed}, {"mutant-race", mutant_race},
};

}  // namespace

int main(int count, char** arguments) {
    for (const Part& part : kParts) {
        if (count == 2 && std::string(arguments[1]) == part.name) {
            part.run();
            std::printf("%s: done\n", part.name);
            return 0;
        }
    }
    std::fprintf(stderr, "expected one of:");
    for (const Part& part : kParts) std::fprintf(stderr, " %s", part.name);
    std::fprintf(stderr, "\n");
    return 2;
}
