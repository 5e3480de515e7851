//! The kernel's maps for unwinding, and mappings that change. Needs root and a kernel with BTF.

use std::process::Command;

use gannet_agent::kernel::{Kernel, KernelMapping, KernelOptions, UnwindDriver, UnwindMaps as _, blocks};
use rstest::rstest;

use crate::common::{idle_functions, in_order, is_marked, program, record, slower};

/// Checks the edges of mappings in the trie (R5, R7).
#[test]
fn an_address_is_found_exactly_within_its_mapping() {
    let mut kernel = Kernel::start(KernelOptions::default()).unwrap();
    let mapping = |begin: u64, end: u64| KernelMapping { begin, end, bias: 0, table: None };
    // Two mappings that touch and one far above; the same and others for a second process.
    let first =
        [mapping(0x1000, 0x7000), mapping(0x7000, 0x8000), mapping(0x7fff_ffff_0000, 0x7fff_ffff_5000)];
    let second = [mapping(0x3000, 0x9000), mapping(u64::MAX - 0xffff, u64::MAX - 0xfff)];
    let mut keys = 0;
    for (tgid, mappings) in [(100, &first[..]), (101, &second[..])] {
        for mapping in mappings {
            for block in blocks(mapping.begin, mapping.end).unwrap() {
                kernel.set_mapping(tgid, block, mapping).unwrap();
                keys += 1;
            }
        }
    }
    assert_eq!(kernel.unwind_entries(), (keys, 0), "as many as were written");
    for (tgid, mappings) in [(100, &first[..]), (101, &second[..]), (102, &[][..])] {
        let edges = first.iter().chain(&second).flat_map(|mapping| {
            blocks(mapping.begin, mapping.end)
                .unwrap()
                .into_iter()
                .map(|block| block.address)
                .chain([mapping.end])
        });
        for address in edges.flat_map(|edge| [edge - 1, edge, edge.saturating_add(1)]) {
            let expected = mappings
                .iter()
                .find(|mapping| mapping.begin <= address && address < mapping.end)
                .map(|mapping| (mapping.begin, mapping.end));
            assert_eq!(kernel.mapping_at(tgid, address), expected, "{tgid} {address:#x}");
        }
    }
    for (tgid, mappings) in [(100, &first[..]), (101, &second[..])] {
        for block in mappings.iter().flat_map(|mapping| blocks(mapping.begin, mapping.end).unwrap()) {
            kernel.remove_mapping(tgid, block);
        }
    }
    assert_eq!(kernel.unwind_entries(), (0, 0));
}

#[test]
fn the_verifier_is_far_from_its_limit() {
    for unwind_driver in [UnwindDriver::Loop, UnwindDriver::TailCalls] {
        // Kernels before 5.17 know only the chain.
        let Ok(opened) = Kernel::open(KernelOptions { unwind_driver, ..KernelOptions::default() }) else {
            continue;
        };
        let Ok((loaded, verified)) = opened.load_counted() else {
            assert!(unwind_driver == UnwindDriver::Loop, "the chain loads everywhere");
            continue;
        };
        for program in loaded.attach().unwrap().programs() {
            let instructions = verified[program.name];
            eprintln!("verified {}: {instructions} instructions", program.name);
            assert!((1..500_000).contains(&instructions), "{program:?}: {verified:?}");
            // Kernels before 5.16 count this, and report no error here.
            assert!([0, instructions].contains(&program.verified_instructions), "{program:?}: {verified:?}");
        }
    }
}

/// A program that maps one library after the other at the same address, moves, cuts and replaces them, and calls the library
/// that is there.
const CHANGES: &str = r"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
volatile long sink;
int rounds;
/* The first page of a library's code. */
static void *map(const char *path, void *at, int flags) {
	int file = open(path, O_RDONLY);
	void *code = mmap(at, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | flags, file, 4096);
	close(file);
	return code;
}
__attribute__((noinline)) long stage_first(long (*f)(long)) { for (int i = 0; i < rounds; i++) sink += f(100000); return sink; }
__attribute__((noinline)) long stage_replaced(long (*f)(long)) { for (int i = 0; i < rounds; i++) sink += f(100000); return sink; }
__attribute__((noinline)) long stage_moved(long (*f)(long)) { for (int i = 0; i < rounds; i++) sink += f(100000); return sink; }
__attribute__((noinline)) long stage_again(long (*f)(long)) { for (int i = 0; i < rounds; i++) sink += f(100000); return sink; }
int main(int count, char **words) {
	rounds = atoi(words[3]);
	/* The function is at the begin of the page. */
	char *place = map(words[1], 0, 0);
	if (place == MAP_FAILED) return 1;
	sink += stage_first((void *)place);
	if (map(words[2], place, MAP_FIXED) != place) return 2;
	sink += stage_replaced((void *)place);
	char *elsewhere = mmap(0, 1 << 20, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (mremap(place, 4096, 4096, MREMAP_MAYMOVE | MREMAP_FIXED, elsewhere) != elsewhere) return 3;
	sink += stage_moved((void *)elsewhere);
	munmap(elsewhere, 1 << 20);
	if (map(words[1], elsewhere, MAP_FIXED) != elsewhere) return 4;
	sink += stage_again((void *)elsewhere);
	return 0;
}
";

#[rstest]
#[case::with_its_tables(20_000, [0, 0])]
// An emulated machine takes ten times as long for a table, but hardly longer for a loop.
/// Checks samples while mappings change all the time (R15).
#[case::before_it_has_its_tables(4_000 * slower(), [1_500_000, 100_000])]
fn no_frame_has_the_name_of_an_unmapped_file(#[case] rounds: u32, #[case] idle: [u32; 2]) {
    let library = |name: &str, function: &str, more: &str| {
        let source = format!(
            "long {function}(long n) {{ long s = 0; for (long i = 0; i < n; i++) {{ s += i; __asm__ volatile(\"\" : \"+r\"(s)); }} return s; }}\n{more}"
        );
        program(
            name,
            &source,
            &["-shared", "-fPIC", "-nostdlib", "-Wl,-Ttext=0x1000", "-Wl,-z,separate-code"],
        )
    };
    let one = library("one.so", "code_of_one", "");
    // This builds both programs, so that other machines have theirs.
    let two = idle.map(|count| {
        let more = if count == 0 { String::new() } else { idle_functions(count) };
        library("two.so", "code_of_two", &more)
    });
    let two = &two[usize::from(slower() > 1)];
    let host = program("changes", CHANGES, &[]);
    let [host, one, two] = [&host, &one, two].map(|path| path.to_str().unwrap());
    // Each function is at the beginning of its page, where the program calls it.
    let status =
        Command::new("sh").args(["-c", "test -s \"$0\" && test -s \"$1\"", one, two]).status().unwrap();
    assert!(status.success());
    let recording = record(499, &["--", host, one, two, &rounds.to_string()]);
    for (stage, function) in [
        ("stage_first", "code_of_one"),
        ("stage_replaced", "code_of_two"),
        ("stage_moved", "code_of_two"),
        ("stage_again", "code_of_one"),
    ] {
        let whole =
            |stack: &[String]| in_order(stack, &["_start", "main", stage, function]) && !is_marked(stack);
        // A sample between two calls has no frame of the library; frames of the kernel may follow.
        let own = |stack: &[String]| {
            let below = stack.iter().skip_while(|frame| *frame != stage).nth(1);
            below.is_none_or(|frame| {
                ["asm_", "entry_", "exc_", "error_"].iter().any(|kernel| frame.starts_with(kernel))
            })
        };
        let (good, all) = recording.share(stage, whole);
        let odd = recording.odd_ones(stage, |stack| whole(stack) || own(stack));
        assert!(all >= 30 && odd.is_empty() && good * 10 >= all * 9, "{stage}: {good} of {all}: {odd:?}");
    }
}
