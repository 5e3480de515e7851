//! Code that programs make at run time: its names come from perf maps, which are read before and after the end of the process.

use std::path::PathBuf;

use crate::common::{Recording, program, record, slower};

const JIT: &str = include_str!("../data/cases/jit.c");

fn jit() -> PathBuf {
    program("jit", JIT, &[])
}

/// Records a command from its first instruction to its end.
#[track_caller]
pub(crate) fn record_command(command: &[&str]) -> Recording {
    record(99 / slower(), &[&["--"], command].concat())
}

/// Returns the share of the samples whose stack has a frame with this text, in percent.
fn share(recording: &Recording, text: &str) -> u64 {
    let of =
        |stacks: &mut dyn Iterator<Item = &(Vec<String>, u64)>| stacks.map(|(_, count)| count).sum::<u64>();
    let named =
        of(&mut recording.stacks.iter().filter(|(stack, _)| stack.iter().any(|name| name.contains(text))));
    named * 100 / of(&mut recording.stacks.iter()).max(1)
}

#[track_caller]
pub(crate) fn assert_named(recording: &Recording, text: &str) {
    let share = share(recording, text);
    assert!(share > 80, "{text}: {share} %\n{:?}\n{}", recording.stacks, recording.log);
}

#[test]
fn code_of_a_process_that_has_ended_has_names() {
    assert_named(&record_command(&[jit().to_str().unwrap()]), "jit_spin");
}

/// Checks programs that tidy up: the map is removed before the program ends, or written at its end only.
#[test]
fn a_perf_map_that_was_removed_still_names_code() {
    let removed = JIT.replace("(1000000);\n}", "(1000000);\n  unlink(path);\n}");
    // Without a name in the file system as soon as the work begins, but half a second later than the code.
    let early = JIT.replace("fclose(f);", "fclose(f);\n  usleep(800000);\n  unlink(path);");
    for (name, source) in [("removed_jit", removed), ("early_jit", early)] {
        assert_ne!(source, JIT);
        assert_named(&record_command(&[program(name, &source, &[]).to_str().unwrap()]), "jit_spin");
    }
}

#[test]
fn a_perf_map_that_comes_at_the_end_names_code() {
    let (begin, end) = (JIT.find("FILE *f").unwrap(), JIT.find("for (time_t").unwrap());
    let (write, work) = (&JIT[begin..end], JIT[end..].trim_end().trim_end_matches('}'));
    let late = format!("{}{work}{write}}}\n", &JIT[..begin]);
    assert_named(&record_command(&[program("late_jit", &late, &[]).to_str().unwrap()]), "jit_spin");
}

#[test]
fn code_in_other_namespaces_has_names_after_its_end() {
    let jit = jit();
    let inside = ["unshare", "--pid", "--fork", "--mount-proc", jit.to_str().unwrap()];
    assert_named(&record_command(&inside), "jit_spin");
    // With a /tmp of its own, which is gone when the process has ended.
    let script = format!("cp {} /mnt/jit && mount -t tmpfs none /tmp && exec /mnt/jit", jit.display());
    let mounted = format!("mount -t tmpfs none /mnt && {script}");
    assert_named(&record_command(&["unshare", "--mount", "sh", "-c", &mounted]), "jit_spin");
}

/// Checks that the newest of two lines names the code, though the older one and 34 MB of others stand before it.
#[test]
fn the_newest_line_of_a_large_perf_map_names_code() {
    let jit = jit();
    let recording = record_command(&[jit.to_str().unwrap(), "new_name", "34", "old_name"]);
    assert_named(&recording, "new_name");
    assert_eq!(share(&recording, "old_name"), 0);
}
