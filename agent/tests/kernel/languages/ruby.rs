//! Ruby. Needs `/usr/bin/ruby` 3.1, 3.3 or 3.4, or others in `GANNET_TEST_RUBIES`.

use std::{collections::BTreeMap, env};

use super::{record_program, stacks_case};
use crate::common::{proven, slower};

const SYSTEM_RUBY: &str = "/usr/bin/ruby";
/// Says which interpreters to test: paths with `:` between them.
const RUBIES: &str = "GANNET_TEST_RUBIES";
/// The mapping of Ruby functions, and the native function that runs them: it has a name in Debian's 3.1.
const LOOP: (&str, &str) = ("[ruby]", "rb_vm_exec");

/// Prints the version; then `CASE;FUNCTION LINE;...` for each case, leaf first, and spins in it. A function of C, or of Ruby's own
/// files, has no line.
const PROGRAM: &str = r##"
puts RUBY_VERSION
$stdout.sync = true

OF_RUBY = %w[each map sort_by inject loop times each_with_index tap send call instance_eval resume]

def stack(name)
  frames = caller_locations(2).map do |frame|
    # From 3.4 on, names have those of classes.
    label = frame.label.sub(/(?:[A-Z]\w*(?:::[A-Z]\w*)*[#.])(?=[^#.]+\z)/, "")
    OF_RUBY.include?(label) ? label : "#{label} #{frame.lineno}"
  end
  puts [name, *frames].join(";")
end

def spin(name)
  stack(name)
  finish = Process.clock_gettime(Process::CLOCK_MONOTONIC) + 0.1
  while Process.clock_gettime(Process::CLOCK_MONOTONIC) < finish
    i = 0
    while i < 1000
      i +=
        1
    end
  end
end

def plain = spin("plain")

def block
  [1].each do |item|
    spin("block")
  end
end

def sorted
  [2, 1].sort_by { |item|
    item == 2 ?
      spin("sorted").to_i : 1 }
end

def reduced
  (1..2).inject do |left, right|
    spin("reduced")
  end
end

module Outer
  class Service
    def self.make = new.handle
    def handle
      self.class.instance_method(:inner)
      send(:inner)
    end
    def inner = spin("method")
    define_method(:dynamic) do
      spin("dynamic")
    end
    def method_missing(name, *) = spin("missing")
    def respond_to_missing?(*) = true
  end
end

def recursion(depth)
  if depth > 0
    recursion(depth - 1)
  else
    spin("recursion")
  end
end

def rescued
  begin
    raise ArgumentError
  rescue ArgumentError
    spin("rescued")
  ensure
    nil
  end
end

def fiber
  Fiber.new { spin("fiber") }.resume
end

def thread
  Thread.new { spin("thread") }.join
end

def numbers
  yield 1
end

def yielded
  numbers { |number|
    spin("yielded") }
end

def lambda_called
  job = ->(name) { spin(name) }
  job.call("lambda")
end

LONG = Class.new do
  class_eval("def long(n)\n" + "  n += 1\n" * 400 + "  spin('long')\nend", $0, 1000)
end

TEXT = "x" * 100_000_000
def native
  [TEXT].each { |text| text.count("y") }
end

loop do
  plain
  block
  sorted
  reduced
  Outer::Service.make
  Outer::Service.new.dynamic
  Outer::Service.new.absent
  recursion(60)
  rescued
  fiber
  thread
  yielded
  lambda_called
  LONG.new.long(1)
  native
end
"##;

/// Cases that print their stack.
const CASES: usize = 14;

/// Checks that each stack is the one that the program printed.
#[test]
fn ruby_stacks_are_those_that_the_program_printed() {
    let rubies = env::var(RUBIES).unwrap_or_else(|_| SYSTEM_RUBY.to_owned());
    for ruby in rubies.split(':') {
        check(ruby);
    }
}

/// Returns where C code calls a Ruby function in the stack that a case of 3.1 printed: a block, or a method that is a block.
fn calls_of_c(case: &str, frames: &[String]) -> Vec<usize> {
    let is_of_c = |frame: &str| ["each", "sort_by", "inject", "loop"].contains(&frame);
    let mut at: Vec<usize> = (1..frames.len())
        .filter(|at| is_of_c(&frames[*at]) && !is_of_c(&frames[at - 1]) || *at == 1 && case == "dynamic")
        .collect();
    at.push(frames.len());
    at
}

/// From 3.4 on, Ruby prints the frame of a `rescue` in place of that of its method.
fn merge_rescue(stack: &mut Vec<String>) {
    let place = stack.iter().zip(stack.iter().skip(1)).position(|(frame, caller)| {
        let name = frame.strip_prefix("rescue in ").and_then(|frame| frame.split(' ').next());
        name.is_some() && name == caller.split(' ').next()
    });
    if let Some(at) = place {
        stack.remove(at + 1);
        stack[at] = stack[at]["rescue in ".len()..].to_owned();
    }
}

#[track_caller]
fn check(ruby: &str) {
    let recorded = record_program(ruby, &["--disable=gems"], "app.rb", PROGRAM, CASES);
    let version = recorded.first_line.as_str();
    recorded.check_labels("ruby", |found| found == Some(version));
    let stacks = recorded.stacks(LOOP);
    // The loop of a stripped file has no name: the order among C frames is not checked there.
    let has_name = stacks.iter().any(|(stack, _)| stack.iter().any(|frame| frame == "|"));
    assert_eq!(has_name, version.starts_with("3.1."), "a frame of the loop has a name");
    let spin_line = 1 + PROGRAM.lines().position(|line| line.contains("  while Process")).unwrap();
    let expected: BTreeMap<&str, Vec<String>> = recorded
        .printed
        .iter()
        .map(|(case, frames)| {
            let mut frames = frames.clone();
            if has_name {
                for at in calls_of_c(case, &frames).into_iter().rev() {
                    frames.insert(at, "|".to_owned());
                }
            }
            (case.as_str(), frames)
        })
        .collect();
    let (mut good, mut all, mut without, mut native) = (0, 0, 0, 0);
    let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
    let mut odd: BTreeMap<Vec<String>, u64> = BTreeMap::new();
    for (mut stack, count) in stacks {
        if version.starts_with("3.4.") {
            merge_rescue(&mut stack);
        }
        if stack.iter().all(|frame| frame == "|") {
            without += count;
            continue;
        }
        if stack[0] == "count" {
            native += count;
        }
        // Between the cases the program prints. A function of C may be the leaf.
        let of_c = ["clock_gettime", "<", "+"];
        let frames = if of_c.contains(&stack[0].as_str()) { &stack[1..] } else { &stack[..] };
        let Some(line) = frames.first().and_then(|leaf| leaf.strip_prefix("spin ")) else { continue };
        let line: usize = line.parse().unwrap();
        // Lines of the function before its loop run for microseconds.
        if line < spin_line && line > 0 {
            continue;
        }
        all += count;
        let is_line = (spin_line..spin_line + 6).contains(&line);
        let case = expected.iter().find(|(_, wanted)| wanted[..] == frames[1..] && is_line);
        if let Some((case, _)) = case {
            good += count;
            *seen.entry(case).or_default() += count;
        } else {
            *odd.entry(stack.clone()).or_default() += count;
        }
    }
    eprintln!("{version}: {good} good of {all}, {without} without Ruby frames, {native} in C; {seen:?}");
    let slower = u64::from(slower());
    assert!(
        all >= 300 / slower && good * 100 >= all * 99,
        "{good} of {all}: {odd:#?}\nexpected {expected:#?}"
    );
    assert!(seen.len() == CASES && seen.values().all(|count| *count >= 10 / slower), "{seen:?}");
    assert!(native >= 10, "{native} samples in a function of C");
    // The first samples come before the unwind table is built.
    assert!(without * 5 <= all * slower, "{without} of {all} without Ruby frames");
    proven::note("ruby", version, stacks_case(has_name), good, all);
}
