//! Profiles as files in all formats.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use gannet_agent::output::{Destination, Details, Format, OutputError, render};
use gannet_proto::{
    ledger::{Ledger, LossReason},
    pprof::{self, Builder, Header, Label, LabelValue, Line, Mapping},
    profiles::Profile,
};

fn profile() -> Profile {
    let mut builder = Builder::new(Header {
        sample_types: &[("samples", "count"), ("cpu", "nanoseconds")],
        period_type: ("cpu", "nanoseconds"),
        period: 10_000_000,
        time_nanos: 1_700_000_000_000_000_000,
        duration_nanos: 10_000_000_000,
    });
    let program =
        Mapping { start: 0x1000, limit: 0x9000, offset: 0, file: "/usr/bin/shop", build_id: "00ff" };
    let program = builder.mapping(program);
    let kernel =
        Mapping { start: 1 << 63, limit: u64::MAX, offset: 0, file: "[kernel.kallsyms]", build_id: "" };
    let kernel = builder.mapping(kernel);
    let line = |name| Line { name, system_name: name, ..Line::default() };
    let main = builder.location(Some(program), 0x1000, &[line("main")]);
    let work =
        builder.location(Some(program), 0x2000, &[line("std::vec<int>::push; back"), line("checkout")]);
    let read = builder.location(Some(kernel), (1 << 63) + 5, &[line("vfs_read")]);
    let unnamed = builder.location(Some(program), 0x3000, &[]);
    let nowhere = builder.location(None, 0x10, &[]);
    let comm = |comm| [Label { key: "comm", value: LabelValue::Str(comm) }];
    builder.sample(&[work, main], &[3, 30_000_000], &comm("shop"));
    builder.sample(&[read, work, main], &[2, 20_000_000], &comm("shop"));
    builder.sample(&[unnamed, main], &[1, 10_000_000], &comm("other;name"));
    builder.sample(&[nowhere], &[1, 10_000_000], &[]);
    builder.comment("rule <b>@picture@</b>");
    builder.finish()
}

fn details() -> Details {
    let mut ledger = Ledger { taken: 10, delivered: 7, ..Ledger::default() };
    ledger.lose(LossReason::RingFull, 3);
    Details { title: "all <script>alert(1)</script> & more".into(), ledger, ..Details::default() }
}

fn text(format: Format) -> String {
    String::from_utf8(render(&profile(), format, &details()).unwrap()).unwrap()
}

#[test]
fn pprof_reads_back_as_the_same_profile() {
    let bytes = render(&profile(), Format::Pprof, &details()).unwrap();
    assert_eq!(pprof::decode(&bytes, 1 << 20).unwrap(), profile());
}

#[test]
fn folded_stacks_are_root_first_and_add_up_to_the_total() {
    let folded = text(Format::Folded);
    assert_eq!(
        folded,
        "\
[unknown] 10000000
other:name;main;[shop] 10000000
shop;main;checkout;std::vec<int>::push: back 30000000
shop;main;checkout;std::vec<int>::push: back;vfs_read 20000000
"
    );
    let sum: i64 = folded.lines().map(|line| line.rsplit_once(' ').unwrap().1.parse::<i64>().unwrap()).sum();
    assert_eq!(sum, profile().sample.iter().map(|sample| sample.value[1]).sum::<i64>());
}

#[test]
fn the_picture_names_each_frame_and_links_to_nothing() {
    for (format, begin) in [(Format::Svg, "<?xml"), (Format::Html, "<!doctype html>")] {
        let picture = text(format);
        assert!(picture.starts_with(begin));
        for name in
            ["shop", "main", "checkout", "std::vec&lt;int&gt;::push", "vfs_read", "[shop]", "[unknown]"]
        {
            assert!(picture.contains(name), "{name} is missing");
        }
        assert!(picture.contains("50 ms"), "the time of `checkout` is missing");
        for link in ["src=\"http", "href=\"http", "url(http", "@import"] {
            assert!(!picture.contains(link), "{link}");
        }
    }
}

/// A profile of one stack for each of these names: `worker` calls it.
fn profile_of(names: &[&str]) -> Profile {
    let mut builder = Builder::new(Header {
        sample_types: &[("samples", "count"), ("cpu", "nanoseconds")],
        period_type: ("cpu", "nanoseconds"),
        period: 10_000_000,
        time_nanos: 1_700_000_000_000_000_000,
        duration_nanos: 10_000_000_000,
    });
    let mapping = Mapping { start: 0x1000, limit: 0x9000, offset: 0, file: "[anon]", build_id: "" };
    let mapping = builder.mapping(mapping);
    let line = |name| Line { name, system_name: name, ..Line::default() };
    let caller = builder.location(Some(mapping), 0x1000, &[line("worker")]);
    for (address, name) in (0x2000..).zip(names) {
        let leaf = builder.location(Some(mapping), address, &[line(name)]);
        builder.sample(&[leaf, caller], &[1, 20_000_000], &[]);
    }
    builder.finish()
}

/// Checks that no part of a name is taken for a column of values, a mark or a separator.
#[test]
fn a_name_is_shown_whole_in_each_format() {
    let names = [
        ("worker 12", "worker 12", "worker 12"),
        ("step 7 1.5", "step 7 1.5", "step 7 1.5"),
        ("42", "42", "42"),
        ("space at the end ", "space at the end ", "space at the end "),
        ("  space before", "  space before", "  space before"),
        ("a; b;c 3", "a: b:c 3", "a; b;c 3"),
        ("not_a_kernel_function_[k]", "not_a_kernel_function_[k]", "not_a_kernel_function_[k]"),
        ("operator[]", "operator[]", "operator[]"),
        ("{closure#0} {x}", "{closure#0} {x}", "{closure#0} {x}"),
        ("two\nlines\t\u{1b}[1m", "two?lines??[1m", "two?lines??[1m"),
        ("no\u{ffff}xml", "no\u{ffff}xml", "no?xml"),
        ("<&\"'>", "<&\"'>", "&lt;&amp;&quot;&apos;&gt;"),
        ("λ → 9", "λ → 9", "λ → 9"),
    ];
    let profile = profile_of(&names.map(|(name, ..)| name));
    let text = |format| String::from_utf8(render(&profile, format, &Details::default()).unwrap()).unwrap();
    let folded = text(Format::Folded);
    let pictures = [text(Format::Svg), text(Format::Html)];
    for (name, in_folded, in_picture) in names {
        let line = format!("worker;{in_folded} 20000000");
        assert!(folded.lines().any(|found| found == line), "{name:?} in {folded}");
        for picture in &pictures {
            let title = format!("<title>{in_picture} (20 ms, {:.2}%)</title>", 100.0 / 13.0);
            assert!(picture.contains(&title), "{title} in {picture}");
            assert!(!picture.contains(|c: char| c.is_control() && c != '\n' && c != '\t'));
        }
        let decoded = pprof::decode(&pprof::encode(&profile), 1 << 20).unwrap();
        assert!(decoded.string_table.iter().any(|text| text == name), "{name:?}");
    }
    assert_eq!(folded.lines().count(), names.len());
}

/// Checks that one function is one rectangle, though another name sorts between it and its callees.
#[test]
fn a_function_with_a_longer_namesake_is_drawn_once() {
    let mut builder = Builder::new(Header {
        sample_types: &[("cpu", "nanoseconds")],
        period_type: ("cpu", "nanoseconds"),
        period: 1,
        time_nanos: 1,
        duration_nanos: 1,
    });
    let line = |name| Line { name, system_name: name, ..Line::default() };
    let [work, cold, leaf] =
        ["work", "work.cold", "leaf"].map(|name| builder.location(None, 0, &[line(name)]));
    for stack in [&[work][..], &[cold], &[leaf, work]] {
        builder.sample(stack, &[1_000_000], &[]);
    }
    let svg = render(&builder.finish(), Format::Svg, &Details::default()).unwrap();
    let svg = String::from_utf8(svg).unwrap();
    assert_eq!(svg.matches("<title>work (2 ms, 66.67%)</title>").count(), 1, "{svg}");
}

#[test]
fn the_page_shows_losses_and_escapes_names() {
    let page = text(Format::Html);
    let facts = [
        ("samples taken", "10"),
        ("delivered", "7"),
        ("lost", "3"),
        ("lost: ring full", "3"),
        ("recorded for", "10.0 s"),
        ("from", "2023-11-14 22:13:20 UTC"),
    ];
    for (name, value) in facts {
        assert!(page.contains(&format!("<dt>{name}</dt><dd>{value}</dd>")), "{name}");
    }
    assert!(page.contains("all &lt;script&gt;alert(1)&lt;/script&gt; &amp; more"));
    assert!(page.contains("rule &lt;b&gt;&#64;picture&#64;&lt;/b&gt;"));
    assert!(!page.contains("<script>alert"));
    assert_eq!(page.matches("<main><svg").count(), 1);
    assert!(page.contains("prefers-color-scheme: dark"));
}

#[test]
fn a_file_appears_complete_or_not_at_all() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out.folded");
    fs::write(&path, "old").unwrap();
    let destination: Destination = path.to_str().unwrap().parse().unwrap();
    destination.write(&profile(), &details()).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), text(Format::Folded));
    assert_ne!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0, "the file is not readable");

    // An empty profile leaves the former file as it is.
    let error = destination.write(&Profile::default(), &details()).unwrap_err();
    assert!(matches!(error, OutputError::Empty), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), text(Format::Folded));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "a temporary file is left behind");
}

#[test]
fn a_path_that_cannot_be_written_is_named() {
    let destination: Destination = "/nowhere/at/all.svg".parse().unwrap();
    let error = destination.write(&profile(), &details()).unwrap_err().to_string();
    assert!(error.contains("/nowhere/at/all.svg") && error.contains("No such file"), "{error}");
    let full: Destination = "/dev/full/x.svg".parse().unwrap();
    assert!(full.write(&profile(), &details()).is_err());
}

#[test]
fn a_damaged_profile_is_refused() {
    let mut damaged = profile();
    damaged.sample[0].location_id.push(99);
    let error = render(&damaged, Format::Folded, &details()).unwrap_err().to_string();
    assert!(error.contains("location"), "{error}");
    assert!(
        matches!("x".parse::<Destination>(), Err(OutputError::UnknownEnding(path)) if path == Path::new("x"))
    );
}

/// Checks that a Python function shows file and line, in its own colour, and that a flag brings the interpreter's frames back.
#[test]
fn interpreted_functions_show_their_file_and_line() {
    let mut builder = Builder::new(Header {
        sample_types: &[("cpu", "nanoseconds")],
        period_type: ("cpu", "nanoseconds"),
        period: 1,
        time_nanos: 1,
        duration_nanos: 1,
    });
    let native = Mapping { limit: 0x1000, file: "/usr/bin/python3.11", ..Mapping::default() };
    let (native, python) =
        (builder.mapping(native), builder.mapping(Mapping { file: "[cpython]", ..Mapping::default() }));
    let the_loop = Line { name: "_PyEval_EvalFrameDefault", ..Line::default() };
    let the_loop = builder.location(Some(native), 1, &[the_loop]);
    let handle =
        Line { name: "App.handle", file: "/srv/app.py", line: 14, start_line: 12, ..Line::default() };
    let handle = builder.location(Some(python), 0, &[handle]);
    builder.sample(&[handle, the_loop], &[1_000_000], &[]);
    let profile = builder.finish();
    let text = |format, interpreter_frames| {
        let details = Details { interpreter_frames, ..Details::default() };
        String::from_utf8(render(&profile, format, &details).unwrap()).unwrap()
    };
    assert_eq!(text(Format::Folded, false), "App.handle (app.py:12) 1000000\n");
    assert_eq!(text(Format::Folded, true), "_PyEval_EvalFrameDefault;App.handle (app.py:12) 1000000\n");
    let svg = text(Format::Svg, false);
    assert!(svg.contains("<title>App.handle (app.py:12) (1 ms, 100.00%)</title>"), "{svg}");
    assert!(!svg.contains("_[j]") && !svg.contains("EvalFrameDefault"), "{svg}");
}

#[test]
fn hidden_error_frames_leave_their_values_to_the_callers() {
    let mut builder = Builder::new(Header {
        sample_types: &[("cpu", "nanoseconds")],
        period_type: ("cpu", "nanoseconds"),
        period: 10_000_000,
        time_nanos: 1_700_000_000_000_000_000,
        duration_nanos: 10_000_000_000,
    });
    let mut named = |at, name| builder.location(None, at, &[Line { name, ..Line::default() }]);
    let (leaf, truncated, broken) = (named(1, "leaf"), named(2, "[truncated]"), named(3, "[broken stack]"));
    let unknown = builder.location(None, 9, &[]);
    builder.sample(&[unknown, leaf, truncated], &[1_000_000], &[]);
    builder.sample(&[broken], &[2_000_000], &[]);
    let profile = builder.finish();
    let text = |hide_error_frames| {
        let details = Details { hide_error_frames, ..Details::default() };
        String::from_utf8(render(&profile, Format::Folded, &details).unwrap()).unwrap()
    };
    assert_eq!(text(false), "[broken stack] 2000000\n[truncated];leaf;[unknown] 1000000\n");
    assert_eq!(text(true), "[no stack] 2000000\nleaf 1000000\n");
}

/// Checks the mark in pictures: a frame has it once, whether all of its samples or some of them rest on a guess.
#[test]
fn guessed_frames_are_marked_in_pictures() {
    let mut profile = profile();
    // The stack `shop;main;checkout;push`, without its leaf; a stack with a leaf in the kernel has the same frames without a guess.
    profile.string_table.push(pprof::GUESSED_FROM.to_owned());
    let key = profile.string_table.len() as i64 - 1;
    let at = profile.sample.iter().position(|sample| sample.value[0] == 3).unwrap();
    profile.sample[at].label.push(gannet_proto::profiles::Label { key, num: 1, ..Default::default() });
    let of = |format| String::from_utf8(render(&profile, format, &details()).unwrap()).unwrap();
    for format in [Format::Svg, Format::Html] {
        let picture = of(format);
        assert_eq!(picture.matches("<title>main (guessed) (").count(), 1, "{picture}");
        // That of the process `other;name`, whose samples rest on no guess.
        assert_eq!(picture.matches("<title>main (").count(), 2, "{picture}");
        for name in ["shop (guessed)", "checkout (guessed)", "back (guessed)"] {
            assert!(!picture.contains(name), "{name} is marked");
        }
    }
    assert!(of(Format::Html).contains("Frames marked “(guessed)” may be wrong"));
    assert!(!text(Format::Html).contains("Frames marked"));
    // Other programs read this form, and compare its names.
    assert_eq!(of(Format::Folded), text(Format::Folded));
}
