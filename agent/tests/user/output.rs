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
    Details { title: "all <script>alert(1)</script> & more".into(), ledger }
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
