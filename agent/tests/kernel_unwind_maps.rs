//! Needs root and a kernel with BTF: the maps that stacks are unwound by, the real ones, and mappings that change.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on shall say so at once")]

use gannet_agent::kernel::{Kernel, KernelMapping, KernelOptions, UnwindMaps as _, blocks};

#[test]
fn r5_r7_an_address_is_found_exactly_from_the_first_to_the_last() {
    let mut kernel = Kernel::start(KernelOptions::default()).unwrap();
    let mapping = |begin: u64, end: u64| KernelMapping { begin, end, bias: 0, table: None };
    // Two that touch, one far above; the same and others for a second process.
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
    for walk in [gannet_agent::kernel::Walk::Loop, gannet_agent::kernel::Walk::Chain] {
        // Kernels before 5.17 know only the chain.
        let Ok(opened) = Kernel::open(KernelOptions { walk, ..KernelOptions::default() }) else { continue };
        let Ok(loaded) = opened.load() else {
            assert!(walk == gannet_agent::kernel::Walk::Loop, "the chain loads everywhere");
            continue;
        };
        for program in loaded.attach().unwrap().programs() {
            eprintln!("verified {}: {} instructions", program.name, program.verified_instructions);
            assert!(program.verified_instructions < 500_000, "{program:?}");
        }
    }
}
