use std::time::SystemTime;

use gannet_proto::{
    ledger::LossReason,
    rules::{Caps, parse},
};

use super::{super::intake::Intake, *};
use crate::{
    model::{ProcessKey, SampleKind, StackEnd, Subject},
    rules::{RuleSource, SourceRules},
};

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn image(tgid: u32) -> ImageKey {
    ImageKey { process: ProcessKey { tgid, start_boottime_ns: 1 }, exec_id: 1 }
}

fn rule_book(rules: &str) -> RuleBook {
    let rules = parse(&format!("rules:\n{rules}"), "test").unwrap();
    let mut book = RuleBook::new(Caps::default());
    let set = SourceRules { rules, ..SourceRules::default() };
    assert_eq!(book.replace(RuleSource::Local, set, SystemTime::now()), []);
    book
}

fn captures(book: &RuleBook) -> Captures {
    let mut captures = Captures::new(None, None, Duration::ZERO);
    captures.set_rules(book.slots().watched(SystemTime::now()), Duration::ZERO);
    captures
}

const AT_EXEC: &str = "  - {id: r, match: {comm: [x]}, when: [{exec: {}}], \
    capture: {duration: 10s, max_concurrent: 2}}\n";

fn matched(tgid: u32, parent: Option<u32>) -> Matched<'static> {
    Matched { key: image(tgid), cgroup_id: 7, rules: u64::MAX, candidates: 0, parent, path: "/x" }
}

fn refused(tgid: u32) -> Vec<CaptureAction> {
    vec![CaptureAction::Refuse { key: image(tgid), slot: 0 }]
}

fn sample(tgid: u32, rules: u64) -> Sample {
    let key = image(tgid);
    Sample {
        subject: Subject {
            key: key.process,
            exec_id: key.exec_id,
            ktime_ns: 0,
            cgroup_id: 7,
            comm: String::new(),
            rules,
            candidates: 0,
        },
        tid: tgid,
        kind: SampleKind::OnCpu,
        value_ns: 1,
        kernel: Vec::new(),
        user: Vec::new(),
        end: StackEnd::None,
        end_code: 0,
        marks: crate::model::StackMarks::default(),
        state: 0,
        list_layout: 0,
        labels: None,
        raw: None,
    }
}

#[test]
fn an_exec_match_is_granted_as_long_as_there_is_room() {
    let mut captures = captures(&rule_book(AT_EXEC));
    for tgid in [1, 2] {
        assert_eq!(captures.matched(&matched(tgid, None), true, at(1)), []);
    }
    assert_eq!(captures.matched(&matched(3, None), true, at(1)), refused(3));
    assert_eq!(captures.suppressed().max_concurrent, 1);
    captures.left(1, at(2));
    assert_eq!(captures.matched(&matched(4, None), true, at(2)), []);
    // While captures are refused there is no room at all.
    captures.left(4, at(3));
    assert_eq!(captures.matched(&matched(5, None), false, at(3)), refused(5));
}

#[test]
fn a_child_belongs_to_the_capture_of_its_parent() {
    let mut captures = captures(&rule_book(AT_EXEC));
    captures.matched(&matched(1, None), true, at(1));
    assert_eq!(captures.matched(&matched(2, Some(1)), true, at(1)), []);
    assert_eq!(captures.matched(&matched(3, Some(9)), true, at(1)), refused(3));
    // It is no capture of its own: its end leaves no room that was not there.
    captures.left(2, at(1));
    assert_eq!(captures.matched(&matched(4, None), true, at(1)), []);
    assert_eq!(captures.matched(&matched(5, None), true, at(1)), refused(5));
}

#[test]
fn a_process_that_two_exec_rules_match_takes_the_room_of_one() {
    let two = format!("{AT_EXEC}{}", AT_EXEC.replace("id: r", "id: s"));
    let mut captures = captures(&rule_book(&two));
    for tgid in [1, 2] {
        let second = CaptureAction::Refuse { key: image(tgid), slot: 1 };
        assert_eq!(captures.matched(&matched(tgid, None), true, at(1)), [second]);
        captures.left(tgid, at(1));
    }
    let of_second = Matched { rules: 0b10, ..matched(3, None) };
    assert_eq!(captures.matched(&of_second, true, at(1)), []);
}

#[test]
fn a_capture_at_exec_ends_with_its_time() {
    let mut captures = captures(&rule_book(AT_EXEC));
    captures.matched(&matched(1, None), true, at(1));
    let now = Instant::now();
    assert_eq!(captures.end_due_at_exec(now, at(2)), []);
    let mut granted = sample(1, 0b11);
    captures.strip(&mut granted);
    assert_eq!((granted.subject.rules, captures.strays()), (0b11, 0));
    assert_eq!(captures.end_due_at_exec(now + at(11), at(12)), refused(1));
    let mut late = sample(1, 0b11);
    let mut intake = Intake::new(at(1));
    intake.lose_rules(LossReason::CaptureOver, &mut late, |late| captures.strip(late));
    assert_eq!((late.subject.rules, captures.strays()), (0b10, 1));
    assert_eq!(intake.flow().lost, [(LossReason::CaptureOver, 1)].into());
    assert_eq!(captures.end_due_at_exec(now + at(11), at(12)), []);
}

/// A process of which the agent must decide whether it matches.
fn candidate(tgid: u32, parent: Option<u32>) -> Matched<'static> {
    Matched { rules: 0, candidates: 0b101, ..matched(tgid, parent) }
}

/// Decides that a process matches all that it may. Returns what it is then sampled for.
fn decide(captures: &mut Captures, tgid: u32, may_begin: bool) -> u64 {
    let open = captures.open(image(tgid), 0b101);
    open & !captures.matched_by_agent(image(tgid), open, may_begin, at(1))
}

#[test]
fn what_the_agent_matches_at_exec_is_granted_like_others() {
    let mut captures = captures(&rule_book(AT_EXEC));
    for (tgid, wanted) in [(1, 0b101), (2, 0b101), (3, 0b100)] {
        assert_eq!(captures.matched(&candidate(tgid, None), true, at(1)), []);
        assert_eq!(decide(&mut captures, tgid, true), wanted, "{tgid}");
        // It is refused for good.
        assert_eq!(decide(&mut captures, tgid, true), wanted, "{tgid}");
    }
    assert_eq!(captures.suppressed().max_concurrent, 1);
    // One that already ran, a child of it and a child of one that was refused.
    captures.left(1, at(2));
    assert_eq!(decide(&mut captures, 9, true), 0b100);
    for parent in [9, 3] {
        assert_eq!(captures.matched(&candidate(10, Some(parent)), true, at(2)), []);
        assert_eq!(decide(&mut captures, 10, true), 0b100);
    }
    // A child of one that is captured takes no room.
    assert_eq!(captures.matched(&candidate(11, Some(2)), true, at(2)), []);
    assert_eq!(decide(&mut captures, 11, true), 0b101);
    let next = |captures: &mut Captures, tgid, may_begin| {
        captures.matched(&candidate(tgid, None), true, at(2));
        decide(captures, tgid, may_begin)
    };
    assert_eq!(next(&mut captures, 12, false), 0b100, "while captures are refused");
    assert_eq!(next(&mut captures, 13, true), 0b101);
    // Its samples are no strays until its time is over.
    let clock = Instant::now();
    let strip = |captures: &mut Captures| {
        let mut sample = sample(13, 0b101);
        captures.strip(&mut sample);
        sample.subject.rules
    };
    assert_eq!(strip(&mut captures), 0b101);
    captures.end_due_at_exec(clock + at(11), at(12));
    assert_eq!((strip(&mut captures), decide(&mut captures, 13, true)), (0b100, 0b100));
}

#[test]
fn changed_rules_leave_the_captures_that_the_agent_granted() {
    let mut captures = captures(&rule_book(AT_EXEC));
    for tgid in [1, 2, 3] {
        captures.matched(&candidate(tgid, None), true, at(1));
    }
    decide(&mut captures, 1, true);
    assert_eq!(captures.undecided().len(), 2, "the runtime of the two others is not known yet");
    captures.begin_round();
    assert_eq!(captures.undecided().len(), 3);
    // The kernel does not report them as candidates of this rule.
    assert_eq!(captures.open(image(1), 0b100), 0b101);
    assert_eq!(captures.open(image(2), 0), 0b001);
    assert_eq!(captures.undecided(), [image(3)]);
    // One is not captured that loads an interpreter much later; nor is another image of the process.
    let other = ImageKey { exec_id: 2, ..image(2) };
    assert_eq!(captures.open(other, 0b101), 0b100);
    captures.end_due_at_exec(Instant::now() + at(31), at(32));
    assert_eq!((captures.open(image(2), 0b101), captures.undecided()), (0b100, Vec::new()));
    captures.matched(&candidate(4, None), true, at(33));
    captures.left(4, at(34));
    assert_eq!(captures.undecided(), []);
}

#[test]
fn a_schedule_begins_a_capture_each_time() {
    let schedule = "  - {id: r, match: {comm: [x]}, when: [{schedule: {every: 60s, for: 5s}}]}\n";
    let mut captures = captures(&rule_book(schedule));
    let starts = |captures: &mut Captures, seconds| match captures.due(at(seconds)).as_slice() {
        [] => None,
        [CaptureAction::Begin(start)] => Some((start.rule.clone(), start.duration)),
        other => panic!("{other:?}"),
    };
    assert_eq!(starts(&mut captures, 0), Some(("r".into(), at(5))));
    assert_eq!(starts(&mut captures, 59), None);
    captures.not_begun("r", WatchScope::Node, at(59));
    assert_eq!(starts(&mut captures, 60), Some(("r".into(), at(5))));
    // The former one still runs.
    assert_eq!(starts(&mut captures, 120), None);
}

#[test]
fn a_capture_is_finished_when_its_last_samples_are_unwound() {
    let mut book = rule_book("  - {id: r, match: {comm: [x]}, when: [{schedule: {every: 60s, for: 5s}}]}\n");
    let mut captures = captures(&book);
    let mut begin = |captures: &mut Captures| {
        let reason = CaptureReason { kind: "schedule", evidence: String::new() };
        let ends = Instant::now() + at(5);
        let id = book.start_capture("r", CaptureTarget::All, reason, ends, SystemTime::now()).unwrap();
        let (over, finished) = oneshot::channel();
        captures.begun(id, "r".into(), WatchScope::Node, Some(over));
        (id, finished)
    };
    let (first, mut first_over) = begin(&mut captures);
    let (second, mut second_over) = begin(&mut captures);
    let now = Instant::now();
    let both = BTreeSet::from([first, second]);
    assert!(!captures.has_ended(&both) && captures.ended(&both, |_| false, now).is_empty());
    let none = BTreeSet::new();
    assert!(captures.has_ended(&none));
    assert_eq!(captures.ended(&none, |id| id == second, now), [first]);
    let window = Some(Ulid::new());
    captures.finish(&[first], window, at(1));
    assert_eq!((first_over.try_recv(), second_over.try_recv().is_err()), (Ok(window), true));
    let late = now + LAST_SAMPLES_TIMEOUT;
    assert!(captures.ended(&none, |_| true, now + at(7)).is_empty());
    assert_eq!(captures.ended(&none, |_| true, late), [second]);
    captures.finish(&[second], None, at(9));
    assert_eq!(second_over.try_recv(), Ok(None));
    assert!(!captures.has_ended(&none));
}

#[test]
fn a_group_holds_what_lies_within_and_not_its_namesakes() {
    assert!(is_within("/a/b", "/a/b") && is_within("/a/b/c", "/a/b") && is_within("/x", "/"));
    assert!(!is_within("/a/bc", "/a/b") && !is_within("/a", "/a/b"));
}
