use proptest::{collection, prelude::*};
use prost::Message as _;
use rstest::rstest;

use super::*;
use crate::query::FlameNode;

const MIB: usize = 1 << 20;

fn header() -> Header<'static> {
    Header {
        sample_types: &[("samples", "count"), ("cpu", "nanoseconds")],
        period_type: ("cpu", "nanoseconds"),
        period: 10_101_010,
        time_nanos: 1_700_000_000_000_000_000,
        duration_nanos: 10_000_000_000,
    }
}

/// A sample: frames from the root by number, a count, and the value of a label.
type Stack = (Vec<u8>, i64, Option<u8>);

/// Builds a profile of these stacks from a few functions and mappings.
fn profile_of(stacks: &[Stack]) -> Profile {
    let mut builder = Builder::new(header());
    let kernel = Mapping { start: 1 << 63, limit: u64::MAX, file: "[kernel.kallsyms]", ..Mapping::default() };
    let main =
        Mapping { start: 0x1000, limit: 0x9000, offset: 0x400, file: "/usr/bin/app", build_id: "abcd" };
    for (frames, count, label) in stacks {
        let stack: Vec<_> = frames
            .iter()
            .rev()
            .map(|frame| {
                let mapping = builder.mapping(if frame % 5 == 0 { kernel } else { main });
                if main.start != 0 && frame % 5 != 0 {
                    builder.main_mapping(mapping);
                }
                let name = format!("function_{}", frame % 7);
                let line =
                    Line { name: &name, system_name: &name, file: "app.c", line: 7, ..Line::default() };
                let inlined = Line { name: "inlined", ..line };
                let lines: &[Line<'_>] = match frame % 3 {
                    0 => &[],
                    1 => &[line],
                    _ => &[inlined, line],
                };
                builder.location(Some(mapping), 0x1000 + u64::from(*frame), lines)
            })
            .collect();
        let label = label.map(|n| Label { key: "tid", value: LabelValue::Num(n.into(), "") });
        builder.sample(&stack, &[*count, *count * 10_101_010], label.as_slice());
    }
    builder.comment("ledger: ticks 1");
    builder.finish()
}

fn stacks() -> impl Strategy<Value = Vec<Stack>> {
    let stack = (collection::vec(any::<u8>(), 0..12), 1..100_i64, proptest::option::of(0..3_u8));
    collection::vec(stack, 0..12)
}

fn merged<'a>(profiles: impl IntoIterator<Item = &'a Profile>) -> Profile {
    let mut merger = Merger::new();
    for profile in profiles {
        merger.add(profile).unwrap();
    }
    merger.finish().unwrap()
}

/// Checks that the total of each node is its own value plus the totals of its children. Returns the number of nodes.
#[track_caller]
fn assert_adds_up(root: &FlameNode) -> usize {
    let (mut open, mut nodes) = (vec![root], 0);
    while let Some(node) = open.pop() {
        nodes += 1;
        assert_eq!(
            node.total,
            node.self_ + node.children.iter().map(|c| c.total).sum::<u64>(),
            "{}",
            node.name
        );
        let base: u64 = node.children.iter().map(|c| c.base_total).sum();
        assert_eq!(node.base_total, node.base_self + base, "{}", node.name);
        let sizes: Vec<_> = node.children.iter().map(|c| c.total + c.base_total).collect();
        assert!(sizes.is_sorted_by(|a, b| a >= b), "largest first");
        open.extend(&node.children);
    }
    nodes
}

#[test]
fn a_built_profile_has_every_field() {
    let profile = profile_of(&[(vec![1, 2, 3], 5, Some(1)), (vec![1, 2, 3], 2, Some(1)), (vec![5], 1, None)]);
    assert_eq!(profile.string_table[0], "");
    assert_eq!(profile.sample.len(), 2, "samples with equal stacks and labels are one");
    assert_eq!(
        profile.mapping[0].filename,
        profile.string_table.iter().position(|s| s == "/usr/bin/app").unwrap() as i64
    );
    let flags: Vec<_> = profile
        .mapping
        .iter()
        .map(|m| (m.has_functions, m.has_filenames, m.has_line_numbers, m.has_inline_frames))
        .collect();
    assert_eq!(flags, [(true, true, true, true), (true, true, true, true)]);
    for (ids, len) in [
        (profile.mapping.iter().map(|m| m.id).collect::<Vec<_>>(), profile.mapping.len()),
        (profile.location.iter().map(|l| l.id).collect(), profile.location.len()),
        (profile.function.iter().map(|f| f.id).collect(), profile.function.len()),
    ] {
        assert_eq!(ids, (1..=len as u64).collect::<Vec<_>>());
    }
    let summary = check(&profile).unwrap();
    assert_eq!(summary.sample_types, ["samples/count", "cpu/nanoseconds"]);
    assert_eq!(summary.totals, [8, 8 * 10_101_010]);
    let bytes = encode(&profile);
    assert_eq!(bytes[4..8], [0; 4], "no time in the gzip header");
    assert_eq!(sample_type_index(&profile, ""), Some(1));
    assert_eq!(sample_type_index(&profile, "samples"), Some(0));
    assert_eq!(sample_type_index(&profile, "cpu/nanoseconds"), Some(1));
    assert_eq!(sample_type_index(&profile, "offcpu"), None);
}

#[test]
fn duplicate_labels_and_unused_locations_are_dropped() {
    let mut builder = Builder::new(header());
    let used = builder.location(None, 1, &[]);
    builder.location(None, 2, &[Line { name: "never_sampled", ..Line::default() }]);
    let label = |value| Label { key: "comm", value };
    builder.sample(&[used], &[1, 1], &[label(LabelValue::Str("a")), label(LabelValue::Str("b"))]);
    let profile = builder.finish();
    assert_eq!(profile.sample[0].label.len(), 1);
    assert_eq!((profile.location.len(), profile.function.len()), (1, 0));
    assert!(!profile.string_table.iter().any(|s| s == "never_sampled"));
    check(&profile).unwrap();
}

#[test]
fn unsymbolized_kernel_and_inlined_frames_are_named() {
    let mut builder = Builder::new(header());
    let lib = builder.mapping(Mapping {
        start: 0x7000,
        limit: 0x9000,
        offset: 0x1000,
        file: "/lib/libfoo.so",
        build_id: "",
    });
    let anon = builder.mapping(Mapping { file: "[anon]", ..Mapping::default() });
    let kernel = builder.mapping(Mapping { file: "[kernel.kallsyms]", ..Mapping::default() });
    let outer = Line { name: "outer", ..Line::default() };
    let stack = [
        builder.location(Some(kernel), 9, &[Line { name: "read", ..Line::default() }]),
        builder.location(Some(lib), 0x7234, &[]),
        builder.location(Some(anon), 77, &[]),
        builder.location(None, 5, &[]),
        builder.location(Some(lib), 0x7300, &[Line { name: "inner", ..Line::default() }, outer]),
    ];
    builder.sample(&stack, &[3, 30], &[]);
    let profile = builder.finish();
    assert_eq!(folded(&profile, 0).unwrap(), "outer;inner;[unknown];[anon];libfoo.so+0x1234;read 3\n");
    assert!(profile.mapping.iter().all(|mapping| mapping.has_functions), "pprof names none of them again");
    let mut tree = FlameTree::new();
    tree.add(&profile, 1, Side::Main).unwrap();
    let mut node = &tree.prune(100);
    let mut seen = Vec::new();
    while let Some(child) = node.children.first() {
        seen.push((child.name.as_str(), child.file.as_str(), child.kernel, child.inlined));
        node = child;
    }
    assert_eq!(seen[0], ("outer", "libfoo.so", false, false));
    assert_eq!(seen[1], ("inner", "libfoo.so", false, true));
    assert_eq!(seen[5], ("read", "[kernel.kallsyms]", true, false));
    assert_eq!(node.self_, 30);
}

#[test]
fn folded_stacks_hold_each_name_in_one_frame_of_one_line() {
    let mut builder = Builder::new(header());
    let names = ["worker 12", "a;b", "two\nlines\u{1b}[1m", "{x}"];
    let stack = names.map(|name| builder.location(None, 0, &[Line { name, ..Line::default() }]));
    builder.sample(&stack, &[5, 50], &[]);
    let folded = folded(&builder.finish(), 0).unwrap();
    assert_eq!(folded, "{x};two?lines?[1m;a:b;worker 12 5\n");
}

#[test]
fn a_stack_of_thousands_of_frames_does_not_overflow() {
    let mut builder = Builder::new(header());
    let stack: Vec<_> = (0..5000_u64)
        .map(|i| {
            let name = format!("f{i}");
            builder.location(None, i, &[Line { name: &name, ..Line::default() }])
        })
        .collect();
    builder.sample(&stack, &[1, 1], &[]);
    let profile = builder.finish();
    let mut tree = FlameTree::new();
    tree.add(&profile, 0, Side::Main).unwrap();
    assert_eq!(tree.top(1)[0].name, "f0");
    assert_eq!(folded(&profile, 0).unwrap().matches(';').count(), 4999);
    assert_eq!(assert_adds_up(&tree.prune(10_000)), 5001);
    assert_eq!(assert_adds_up(&tree.prune(100)), 100);
}

#[test]
fn a_recursive_function_counts_once_for_each_stack() {
    // 1 and 8 are one function at two addresses.
    let profile = profile_of(&[(vec![1, 4, 8, 4, 1], 10, None), (vec![4], 1, None)]);
    let mut tree = FlameTree::new();
    tree.add(&profile, 0, Side::Main).unwrap();
    let rows = tree.top(10);
    let row =
        |name: &str| rows.iter().find(|row| row.name == name).map(|row| (row.self_, row.total)).unwrap();
    assert_eq!(row("function_1"), (10, 10));
    assert_eq!(row("function_4"), (1, 11));
    assert_eq!(tree.top(1).len(), 1);
}

#[test]
fn a_comparison_has_both_sides() {
    let (a, b) = (profile_of(&[(vec![1, 4], 10, None)]), profile_of(&[(vec![1, 7], 4, None)]));
    let mut tree = FlameTree::new();
    tree.add(&a, 0, Side::Main).unwrap();
    tree.add(&b, 0, Side::Base).unwrap();
    let root = tree.prune(10);
    assert_adds_up(&root);
    assert_eq!((root.total, root.base_total), (10, 4));
    assert_eq!((tree.total(Side::Main), tree.total(Side::Base)), (10, 4));
    let one = &root.children[0];
    assert_eq!((one.name.as_str(), one.total, one.base_total, one.children.len()), ("function_1", 10, 4, 2));
    assert!(tree.add(&a, 2, Side::Main).is_err(), "the profile has two values");
}

#[test]
fn a_merger_refuses_another_kind_and_continues() {
    let a = profile_of(&[(vec![1], 1, None)]);
    let mut builder =
        Builder::new(Header { sample_types: &[("events", "count"), ("offcpu", "nanoseconds")], ..header() });
    builder.sample(&[], &[1, 1], &[]);
    let mut merger = Merger::new();
    merger.add(&a).unwrap();
    let error = merger.add(&builder.finish()).unwrap_err();
    assert!(error.to_string().contains("[events/count, offcpu/nanoseconds] cannot be merged"), "{error}");
    merger.add(&a).unwrap();
    let sum = merger.finish().unwrap();
    assert_eq!(check(&sum).unwrap().totals[0], 2);
    assert_eq!(sum.duration_nanos, 10_000_000_000, "both profiles cover the same ten seconds");
    assert_eq!(sum.time_nanos, header().time_nanos);
    assert_eq!(sum.comment.len(), 1, "equal comments are one");
    assert!(Merger::new().finish().is_none());
}

/// Checks that senders may differ in their periods, in any order.
#[test]
fn profiles_with_other_periods_merge_into_one_without() {
    let with = |period_type, period| {
        let mut builder = Builder::new(Header { period_type, period, ..header() });
        builder.sample(&[], &[1, 1], &[]);
        builder.finish()
    };
    let all = [with(("cpu", "nanoseconds"), 7), with(("wall", "nanoseconds"), 9), with(("", ""), 5)];
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let sum = merged(&order.map(|index: usize| all[index].clone()));
        let period = sum.period_type.unwrap_or_default();
        assert_eq!((sum.period, period.r#type, check(&sum).unwrap().totals[0]), (0, 0, 3), "{order:?}");
    }
    let same = merged(&[all[0].clone(), all[0].clone()]);
    assert_eq!((same.period, check(&same).unwrap().totals[0]), (7, 2));
}

#[test]
fn a_merged_profile_covers_the_first_start_to_the_last_end() {
    let at = |start, length| Profile {
        time_nanos: start,
        duration_nanos: length,
        ..profile_of(&[(vec![1], 1, None)])
    };
    let span = |sum: Profile| (sum.time_nanos, sum.duration_nanos);
    let profiles = [at(1000, 10), at(1030, 10), at(1005, 10)];
    assert_eq!(span(merged(&profiles)), (1000, 40));
    assert_eq!(span(merged(profiles.iter().rev())), (1000, 40));
    let untimed = [at(0, 20), at(1010, 3), at(1000, 3), at(0, 9)];
    assert_eq!(span(merged(&untimed)), (1000, 13));
    assert_eq!(span(merged(untimed.iter().rev())), (1000, 13));
    assert_eq!(span(merged([&untimed[0], &untimed[3]])), (0, 20));
    assert_eq!(span(merged(&[at(i64::MAX, i64::MAX), at(1, 1)])), (1, i64::MAX - 1));
}

#[test]
fn truncated_and_oversized_profiles_are_refused() {
    let bytes = encode(&profile_of(&[(vec![1, 2], 3, None)]));
    assert_eq!(decode(&bytes[..bytes.len() - 9], MIB), Err(PprofError::Truncated));
    assert_eq!(decode(&bytes[..5], MIB), Err(PprofError::Truncated));
    assert_eq!(decode(&bytes, 10), Err(PprofError::TooLarge { max: 10 }));
    let mut damaged = bytes.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0xff;
    assert!(decode(&damaged, MIB).is_err());
    assert!(matches!(decode(b"\x0a\xff\xff", MIB), Err(PprofError::Protobuf(_))));
    let zeros = Profile { string_table: vec![String::new(), "x".repeat(50 * MIB)], ..Profile::default() };
    assert_eq!(decode(&encode(&zeros), MIB), Err(PprofError::TooLarge { max: MIB }));
}

/// Returns a frame of zstd whose header states this size, in place of the true one.
fn stating(profile: &Profile, size: u32) -> Vec<u8> {
    let mut bytes = encode_as(profile, Encoding::Zstd);
    // Magic number, a descriptor that says how many bytes of size follow, size.
    assert_eq!(bytes[4], 0x60, "a size of two bytes");
    bytes.splice(4..7, [[0xa0].as_slice(), &size.to_le_bytes()].concat());
    bytes
}

/// Checks hostile frames: cut ones, ones that state another size than they have, and ones that state none.
#[test]
fn zstd_frames_that_lie_are_refused() {
    let profile = profile_of(&(0..40).map(|i| (vec![i, i + 1], 3, None)).collect::<Vec<_>>());
    let bytes = encode_as(&profile, Encoding::Zstd);
    let size = profile.encoded_len();
    assert_eq!(decode(&stating(&profile, size as u32), MIB).as_ref(), Ok(&profile));
    for cut in 4..bytes.len() {
        assert!(decode(&bytes[..cut], MIB).is_err(), "cut to {cut}");
    }
    assert_eq!(decode(&bytes[..bytes.len() - 2], MIB), Err(PprofError::Truncated));
    assert_eq!(decode(&bytes, size - 1), Err(PprofError::TooLarge { max: size - 1 }));
    assert_eq!(decode(&stating(&profile, u32::MAX), MIB), Err(PprofError::TooLarge { max: MIB }));
    for wrong in [0, size - 1, size + 1] {
        let found = decode(&stating(&profile, wrong as u32), MIB);
        assert!(matches!(found, Err(PprofError::Zstd(_))), "{wrong} for {size}: {found:?}");
    }
    // A second frame makes it larger than the first states.
    assert!(matches!(decode(&[&bytes[..], &bytes].concat(), MIB), Err(PprofError::Zstd(_))));
    let unsized_frame = zstd::stream::encode_all(&profile.encode_to_vec()[..], 0).unwrap();
    let found = decode(&unsized_frame, MIB).unwrap_err();
    assert!(found.to_string().contains("does not state the size"), "{found}");
}

#[rstest]
#[case::string_zero(|p: &mut Profile| p.string_table[0] = "x".into(), "string 0")]
#[case::no_types(|p: &mut Profile| p.sample_type.clear(), "no sample types")]
#[case::type_name(|p: &mut Profile| p.sample_type[0].unit = 999, "a sample type refers to string 999")]
#[case::negative(|p: &mut Profile| p.function[0].name = -1, "a function refers to string -1")]
#[case::location(|p: &mut Profile| p.sample[0].location_id[0] = 77, "a sample refers to location 77")]
#[case::location_zero(|p: &mut Profile| p.sample[0].location_id[0] = 0, "a sample refers to location 0")]
#[case::mapping(|p: &mut Profile| p.location[0].mapping_id = 9, "a location refers to mapping 9")]
#[case::function(|p: &mut Profile| p.location[0].line[0].function_id = 9, "a location refers to function 9")]
#[case::twice(|p: &mut Profile| p.location[1].id = 1, "the id 1 of a location is 0 or used twice")]
#[case::zero(|p: &mut Profile| p.mapping[0].id = 0, "the id 0 of a mapping is 0 or used twice")]
#[case::values(|p: &mut Profile| p.sample[0].value.truncate(1), "sample 0 has 1 values for 2")]
#[case::below_zero(|p: &mut Profile| p.sample[0].value[0] = -1, "sample 0 has a negative value")]
#[case::label(|p: &mut Profile| { let l = p.sample[0].label[0]; p.sample[0].label.push(l); }, "has the label `tid` twice")]
#[case::comment(|p: &mut Profile| p.comment[0] = 999, "the profile refers to string 999")]
fn an_inconsistent_profile_is_refused(#[case] break_it: fn(&mut Profile), #[case] why: &str) {
    let mut profile = profile_of(&[(vec![1, 4], 5, Some(1))]);
    check(&profile).unwrap();
    break_it(&mut profile);
    let error = check(&profile).unwrap_err().to_string();
    assert!(error.contains(why), "{error}");
    assert!(Merger::new().add(&profile).is_err());
    assert!(FlameTree::new().add(&profile, 0, Side::Main).is_err());
}

#[test]
fn ids_may_have_any_order() {
    let mut profile = profile_of(&[(vec![1, 4, 2], 5, Some(1)), (vec![2], 1, None)]);
    let before = folded(&profile, 0).unwrap();
    let odd = |id: u64| 1000 - id * 3;
    for location in &mut profile.location {
        location.id = odd(location.id);
        location.mapping_id = odd(location.mapping_id);
    }
    profile.mapping.iter_mut().for_each(|mapping| mapping.id = odd(mapping.id));
    profile.sample.iter_mut().flat_map(|s| &mut s.location_id).for_each(|id| *id = odd(*id));
    profile.location.reverse();
    check(&profile).unwrap();
    assert_eq!(folded(&profile, 0).unwrap(), before);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn an_encoded_profile_decodes_to_the_same(stacks in stacks()) {
        let profile = profile_of(&stacks);
        prop_assert_eq!(decode(&encode(&profile), MIB), Ok(profile.clone()));
        prop_assert_eq!(decode(&profile.encode_to_vec(), MIB), Ok(profile.clone()));
        let zstd = encode_as(&profile, Encoding::Zstd);
        prop_assert_eq!(Encoding::of(&zstd), Some(Encoding::Zstd));
        prop_assert_eq!(decode(&zstd, MIB), Ok(profile.clone()));
        let gzip = encode(&profile);
        prop_assert_eq!(&*to_gzip(&zstd, MIB).unwrap(), &gzip);
        prop_assert_eq!(&*to_gzip(&gzip, MIB).unwrap(), &gzip);
    }

    #[test]
    fn the_order_of_samples_does_not_matter(stacks in stacks(), at in any::<prop::sample::Index>()) {
        let mut other = stacks.clone();
        if !other.is_empty() {
            let at = at.index(other.len());
            other.rotate_left(at);
        }
        prop_assert_eq!(encode(&profile_of(&stacks)), encode(&profile_of(&other)));
    }

    #[test]
    fn merging_adds_up_in_any_order(a in stacks(), b in stacks(), c in stacks()) {
        let profiles = [profile_of(&a), profile_of(&b), profile_of(&c)];
        let sum = merged(&profiles);
        let [a, b, c] = &profiles;
        prop_assert_eq!(encode(&sum), encode(&merged([c, a, b])));
        let totals = |p: &Profile| check(p).unwrap().totals;
        let expected: Vec<i64> = (0..2).map(|i| profiles.iter().map(|p| totals(p)[i]).sum()).collect();
        prop_assert_eq!(totals(&sum), expected);
        prop_assert_eq!(encode(&merged([&merged([a, b]), c])), encode(&sum), "in any grouping");
    }

    #[test]
    fn a_tree_of_any_size_has_the_totals_of_its_profiles(a in stacks(), b in stacks(), max in 1_usize..40) {
        let (a, b) = (profile_of(&a), profile_of(&b));
        let mut tree = FlameTree::new();
        tree.add(&a, 1, Side::Main).unwrap();
        tree.add(&b, 1, Side::Base).unwrap();
        let whole = tree.prune(usize::MAX);
        prop_assert_eq!(whole.total as i64, check(&a).unwrap().totals[1]);
        prop_assert_eq!(whole.base_total as i64, check(&b).unwrap().totals[1]);
        assert_adds_up(&whole);
        let pruned = tree.prune(max);
        prop_assert!(assert_adds_up(&pruned) <= max.max(2));
        prop_assert_eq!((pruned.total, pruned.base_total), (whole.total, whole.base_total));
        let own: u64 = tree.top(usize::MAX).iter().map(|row| row.self_).sum();
        // Samples without frames belong to the root.
        prop_assert_eq!(own + whole.self_, whole.total);
        let lines: u64 = folded(&a, 1).unwrap().lines().filter_map(|l| l.rsplit_once(' ')).map(|(_, n)| n.parse::<u64>().unwrap()).sum();
        prop_assert_eq!(lines, whole.total);
    }

    #[test]
    fn any_bytes_decode_without_a_panic(bytes in collection::vec(any::<u8>(), 0..200)) {
        if let Ok(profile) = decode(&bytes, MIB) {
            use_it(&profile);
        }
    }

    #[test]
    fn a_damaged_profile_decodes_without_a_panic(
        stacks in stacks(),
        flips in collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = profile_of(&stacks).encode_to_vec();
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(profile) = decode(&bytes, MIB) {
            use_it(&profile);
        }
    }
}

/// Runs every operation on a profile that passes the check.
fn use_it(profile: &Profile) {
    let Ok(summary) = check(profile) else { return };
    let sum = merged([profile, profile]);
    check(&sum).unwrap();
    for index in 0..summary.totals.len() {
        let mut tree = FlameTree::new();
        tree.add(profile, index, Side::Main).unwrap();
        tree.prune(5);
        tree.top(3);
        folded(profile, index).unwrap();
    }
}

/// A Python program: `main` calls the C function `sorted`, which calls `key`, which sleeps in the kernel. The second stack
/// comes from before the agent knew the interpreter.
fn python() -> Profile {
    let mut builder = Builder::new(header());
    let file = |file| Mapping { limit: 0x1000, file, ..Mapping::default() };
    let native = |builder: &mut Builder, mapping, address, name| {
        let mapping = builder.mapping(file(mapping));
        builder.location(Some(mapping), address, &[Line { name, ..Line::default() }])
    };
    let interpreted = |builder: &mut Builder, name, line| {
        let mapping = builder.mapping(file("[cpython]"));
        let line = Line { name, file: "/srv/app.py", line, start_line: 4, ..Line::default() };
        builder.location(Some(mapping), 0, &[line])
    };
    let python = "/usr/bin/python3.11";
    let start = native(&mut builder, "/usr/lib/libc.so.6", 1, "__libc_start_main");
    let main_c = native(&mut builder, python, 2, "Py_BytesMain");
    let the_loop = native(&mut builder, python, 3, "_PyEval_EvalFrameDefault");
    let sorted = native(&mut builder, python, 4, "builtin_sorted");
    let sleep = native(&mut builder, "[kernel.kallsyms]", 5, "do_nanosleep");
    let (main, key, key_later) = (
        interpreted(&mut builder, "main", 7),
        interpreted(&mut builder, "App.key", 5),
        interpreted(&mut builder, "App.key", 6),
    );
    builder.sample(&[sleep, key, the_loop, sorted, main, the_loop, main_c, start], &[1, 10], &[]);
    builder.sample(&[key_later, the_loop, sorted, main, the_loop, main_c, start], &[1, 10], &[]);
    builder.sample(&[sorted, the_loop, main_c, start], &[1, 10], &[]);
    builder.finish()
}

#[test]
fn frames_of_an_interpreter_are_hidden_between_its_functions() {
    let stacks = "__libc_start_main;Py_BytesMain;_PyEval_EvalFrameDefault;builtin_sorted 1
__libc_start_main;main (app.py:4);App.key (app.py:4) 1
__libc_start_main;main (app.py:4);App.key (app.py:4);do_nanosleep 1
";
    let sorted = |text: &str| {
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&folded(&python(), 0).unwrap()), sorted(stacks));
    let names = |tree: &FlameTree| {
        let nodes = flat(tree.prune(100));
        nodes.into_iter().skip(1).map(|node| node.name).collect::<Vec<_>>()
    };
    let mut tree = FlameTree::new();
    tree.add(&python(), 0, Side::Main).unwrap();
    assert_eq!(names(&tree).iter().filter(|name| *name == "_PyEval_EvalFrameDefault").count(), 1);
    assert_eq!(tree.top(9).iter().find(|row| row.name == "App.key (app.py:4)").unwrap().total, 2);
    let mut tree = FlameTree::new().with_interpreter_frames(true);
    tree.add(&python(), 0, Side::Main).unwrap();
    let all = names(&tree);
    assert_eq!(all.iter().filter(|name| *name == "_PyEval_EvalFrameDefault").count(), 2, "{all:?}");
    assert!(all.contains(&"builtin_sorted".to_owned()), "{all:?}");
}

#[test]
fn frames_of_the_java_machine_stay_between_java_functions() {
    let mut builder = Builder::new(header());
    let file = |file| Mapping { limit: 0x1000, file, ..Mapping::default() };
    let (jvm, library) = (builder.mapping(file("[jvm]")), builder.mapping(file("/usr/lib/libjvm.so")));
    let line = Line { name: "Cart.sum", file: "Cart.java", line: 9, start_line: 7, ..Line::default() };
    let sum = builder.location(Some(jvm), 0, &[line]);
    let stub = builder.location(Some(jvm), 0, &[Line { name: "StubRoutines (1)", ..Line::default() }]);
    let call = Line { name: "JavaCalls::call_helper", ..Line::default() };
    let call = builder.location(Some(library), 8, &[call]);
    builder.sample(&[sum, stub, call], &[1, 1], &[]);
    let stack = "JavaCalls::call_helper;StubRoutines (1);Cart.sum (Cart.java:7) 1\n";
    assert_eq!(folded(&builder.finish(), 0).unwrap(), stack);
}

#[test]
fn error_frames_can_be_hidden_and_their_values_stay() {
    let mut builder = Builder::new(header());
    let mapping = builder.mapping(Mapping { limit: 0x1000, file: "/bin/app", ..Mapping::default() });
    let module = builder.mapping(Mapping { limit: 0x1000, file: "/lib/[brackets]", ..Mapping::default() });
    let mut named = |at, name| {
        let line = Line { name, ..Line::default() };
        builder.location(Some(mapping), at, &[line])
    };
    let (leaf, main) = (named(1, "leaf"), named(2, "main"));
    let (truncated, broken) = (named(3, "[truncated]"), named(4, "[broken stack]"));
    let unknown = builder.location(None, 5, &[]);
    let brackets = builder.location(Some(module), 6, &[]);
    builder.sample(&[leaf, main], &[1, 1], &[]);
    builder.sample(&[leaf, truncated], &[2, 2], &[]);
    builder.sample(&[unknown, main], &[4, 4], &[]);
    builder.sample(&[broken], &[8, 8], &[]);
    builder.sample(&[brackets, main], &[16, 16], &[]);
    let profile = builder.finish();
    let tree = |hidden| {
        let mut tree = FlameTree::new().hide_error_frames(hidden);
        tree.add(&profile, 0, Side::Main).unwrap();
        let nodes = flat(tree.prune(100));
        let names: Vec<_> = nodes.iter().map(|node| (node.name.clone(), node.total, node.self_)).collect();
        (tree.total(Side::Main), names)
    };
    let name = |name: &str, total, own| (name.to_owned(), total, own);
    let (total, shown) = tree(false);
    assert!(total == 31 && shown.iter().any(|node| *node == name("[broken stack]", 8, 8)), "{shown:?}");
    let (total, mut hidden) = tree(true);
    hidden.sort();
    let mut expected = [
        name("all", 31, 8),
        name("main", 21, 4),
        name("leaf", 1, 1),
        name("leaf", 2, 2),
        name("[brackets]", 16, 16),
    ];
    expected.sort();
    assert_eq!((total, hidden), (31, expected.to_vec()));
}

#[test]
fn a_program_that_is_no_interpreter_keeps_all_its_frames() {
    let mut builder = Builder::new(header());
    let mapping = builder.mapping(Mapping { limit: 0x1000, file: "/bin/app", ..Mapping::default() });
    let line = |name| Line { name, ..Line::default() };
    let frames = ["leaf", "_PyEval_EvalFrameDefault", "main"];
    let ids: Vec<_> = frames
        .iter()
        .enumerate()
        .map(|(at, name)| builder.location(Some(mapping), at as u64, &[line(name)]))
        .collect();
    builder.sample(&ids, &[1, 1], &[]);
    assert_eq!(folded(&builder.finish(), 0).unwrap(), "main;_PyEval_EvalFrameDefault;leaf 1\n");
}

/// Checks the mark of frames behind merges and splits, beside frames that hide, and with numbers that no agent writes.
#[test]
fn frames_from_a_guess_to_the_root_are_marked() {
    let built = |marks: &[Option<i64>]| {
        let mut builder = Builder::new(Header {
            sample_types: &[("cpu", "nanoseconds")],
            period_type: ("cpu", "nanoseconds"),
            period: 1,
            time_nanos: 1,
            duration_nanos: 1,
        });
        let mapping =
            builder.mapping(Mapping { start: 0, limit: 0x9000, offset: 0, file: "/bin/a", build_id: "" });
        let mut frame = |mapping, name: &str, address| {
            builder.location(mapping, address, &[Line { name, system_name: name, ..Line::default() }])
        };
        let stack = [
            frame(Some(mapping), "leaf", 1),
            frame(Some(mapping), "middle", 2),
            frame(Some(mapping), "main", 3),
            frame(None, "[truncated]", 0),
        ];
        for (value, mark) in (1..).zip(marks) {
            let label = mark.map(|index| Label { key: GUESSED_FROM, value: LabelValue::Num(index, "") });
            builder.sample(&stack, &[value], label.as_slice());
        }
        builder.finish()
    };
    let guessed = |profile: &Profile| {
        let mut tree = FlameTree::new();
        tree.add(profile, 0, Side::Main).unwrap();
        tree.add(profile, 0, Side::Base).unwrap();
        let mut node = tree.prune(100);
        let mut seen = vec![(node.name.clone(), node.guessed, node.base_guessed)];
        while let Some(child) = node.children.pop() {
            node = child;
            seen.push((node.name.clone(), node.guessed, node.base_guessed));
        }
        seen
    };
    let expected = |of: [u64; 5]| {
        let names = ["all", "[truncated]", "main", "middle", "leaf"];
        names.into_iter().zip(of).map(|(name, value)| (name.to_owned(), value, value)).collect::<Vec<_>>()
    };
    // Values 1, 2 and 4 are of samples without a guess, with one at `middle`, and with one at `main`.
    let (first, second) = (built(&[None, Some(1)]), built(&[None, None, None, Some(2)]));
    assert_eq!(guessed(&first), expected([2, 0, 2, 2, 0]));
    assert_eq!(guessed(&second), expected([4, 0, 4, 0, 0]));
    let mut merger = Merger::new();
    merger.add(&first).unwrap();
    merger.add(&second).unwrap();
    let merged = merger.finish().unwrap();
    assert_eq!(guessed(&merged), expected([6, 0, 6, 2, 0]));
    let mut merger = Merger::new();
    for part in split(merged, 1, usize::MAX) {
        merger.add(&decode(&encode(&part), 1 << 20).unwrap()).unwrap();
    }
    assert_eq!(guessed(&merger.finish().unwrap()), expected([6, 0, 6, 2, 0]));
    for wrong in [0, -1, 4, i64::MAX, i64::MIN] {
        assert_eq!(guessed(&built(&[Some(wrong)])), expected([0; 5]), "{wrong}");
    }
}
