//! PHP. Needs `/usr/bin/php` 8.2 or 8.4 with OPcache, or others in `GANNET_TEST_PHPS`.

use std::{collections::BTreeMap, env};

use super::record_program;
use crate::common::{proven, slower};

const SYSTEM_PHP: &str = "/usr/bin/php";
/// Says which interpreters to test: paths with `:` between them.
const PHPS: &str = "GANNET_TEST_PHPS";
/// The mapping of PHP functions, and the native function that runs them.
const LOOP: (&str, &str) = ("[php]", "execute_ex");

/// Prints version and state of OPcache; then `CASE;FUNCTION LINE;...` for each case, leaf first, `|` where C code calls, and spins in
/// it. A function of C has no line.
const PROGRAM: &str = r#"<?php
namespace App;
echo PHP_VERSION, ' ', function_exists('opcache_get_status') && opcache_get_status() ? 'cached' : 'plain', "\n";

function stack($case) {
    $frames = [];
    $line = null;
    foreach (array_slice(debug_backtrace(DEBUG_BACKTRACE_IGNORE_ARGS), 1) as $frame) {
        $name = (isset($frame['class']) ? explode("\0", $frame['class'])[0] . '::' : '') . $frame['function'];
        if ($frames && $line === null) $frames[] = '|';
        $frames[] = $frames ? $name . " " . ($line ?? "") : $name;
        $line = $frame['line'] ?? null;
    }
    if ($line === null) $frames[] = '|';
    $frames[] = "{main} $line";
    echo implode(';', [$case, ...array_map(trim(...), $frames)]), "\n";
}

function spin($case) {
    stack($case);
    $end = hrtime(true) + 100000000;
    while (hrtime(true) < $end) {
        for ($i = 0;
            $i < 1000;
            ++$i) {
        }
    }
}

function plain() { spin('plain'); }

function callback() {
    $items = [2, 1];
    usort($items,
        function ($left, $right) {
            return spin('callback');
        });
}

function mapped() {
    return array_map(
        fn ($item) => spin('mapped'),
        [1]);
}

function numbers() {
    yield 1;
    yield spin('generator');
}

function generator() {
    foreach (numbers() as $number) {
        $last = $number;
    }
}

trait Handles {
    public function handle() { return spin('method'); }
}
class Inner { use Handles; }
class Service {
    public static function make() {
        return (new Inner)
            ->handle();
    }
    public function __get($name) { return spin('magic'); }
}

function magic() {
    return (new Service)
        ->missing;
}

function recursion($depth) {
    if ($depth) {
        recursion($depth - 1);
    } else {
        spin('recursion');
    }
}

function anonymous() {
    $object = new class {
        function run() { spin('anonymous'); }
    };
    $object->run();
}

function fiber() {
    $fiber = new \Fiber(function () {
        spin('fiber');
    });
    $fiber->start();
}

function native() {
    $texts = array_fill(0, 500, str_repeat('x', 200000));
    array_map('str_rot13', $texts);
}

while (true) {
    plain();
    callback();
    mapped();
    generator();
    Service::make();
    magic();
    recursion(60);
    anonymous();
    fiber();
    native();
}
"#;

/// Cases that print their stack.
const CASES: usize = 9;

/// Returns the stack that samples have of the frames that a case printed.
fn expected(case: &str, printed: &[String]) -> Vec<String> {
    let mut frames = printed.to_vec();
    frames.push("|".to_owned());
    match case {
        // PHP prints no mark where PHP code makes C code call.
        "generator" | "magic" => frames.insert(2, "|".to_owned()),
        // A fiber has a C stack of its own.
        "fiber" => frames.truncate(3),
        _ => {}
    }
    frames
}

/// Checks that each stack is the one that the program printed, with and without OPcache.
#[test]
fn php_stacks_are_those_that_the_program_printed() {
    let phps = env::var(PHPS).unwrap_or_else(|_| SYSTEM_PHP.to_owned());
    for php in phps.split(':') {
        for is_cached in [false, true] {
            check(php, is_cached);
        }
    }
}

#[track_caller]
fn check(php: &str, is_cached: bool) {
    let options = [
        format!("opcache.enable_cli={}", u8::from(is_cached)),
        "opcache.jit=off".to_owned(),
        "opcache.file_update_protection=0".to_owned(),
        // A root directory may have no time zones. PHP would say so before the program prints.
        "display_startup_errors=0".to_owned(),
    ];
    let options: Vec<&str> = options.iter().flat_map(|option| ["-d", option]).collect();
    let recorded = record_program(php, &options, "app.php", PROGRAM, CASES);
    let (version, state) = recorded.first_line.split_once(' ').unwrap();
    assert_eq!(state, if is_cached { "cached" } else { "plain" });
    recorded.check_labels("php", |found| found == Some(version));
    let spin_line = 1 + PROGRAM.lines().position(|line| line.contains("while (hrtime")).unwrap();
    let native_line = 1 + PROGRAM.lines().position(|line| line.contains("'str_rot13'")).unwrap();
    let native_caller = 1 + PROGRAM.lines().position(|line| line == "    native();").unwrap();
    let expected: BTreeMap<&str, Vec<String>> =
        recorded.printed.iter().map(|(case, frames)| (case.as_str(), expected(case, frames))).collect();
    let native_frames = [
        "array_map".to_owned(),
        format!("App\\native {native_line}"),
        format!("{{main}} {native_caller}"),
        "|".to_owned(),
    ];
    let (mut good, mut all, mut without, mut in_loop, mut native) = (0, 0, 0, 0, 0);
    let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
    let mut odd: BTreeMap<Vec<String>, u64> = BTreeMap::new();
    for (stack, count) in recorded.stacks(LOOP) {
        if stack.iter().all(|frame| frame == "|") {
            without += count;
            continue;
        }
        // Between the cases the program prints, and makes the texts of the last case.
        let frames = if stack[0] == "hrtime" { &stack[1..] } else { &stack[..] };
        if frames.ends_with(&native_frames) {
            all += count;
            let known = frames.len() == 4 || frames.len() == 5 && frames[0] == "str_rot13";
            good += if known { count } else { 0 };
            native += if frames.len() == 5 { count } else { 0 };
            if !known {
                *odd.entry(stack.clone()).or_default() += count;
            }
            continue;
        }
        let Some(line) = frames.first().and_then(|leaf| leaf.strip_prefix("App\\spin ")) else { continue };
        let line: usize = line.parse().unwrap();
        // Lines of the function before its loop run for microseconds.
        if line < spin_line && line > 0 {
            continue;
        }
        all += count;
        let is_line = (spin_line..spin_line + 4).contains(&line);
        let case = expected.iter().find(|(_, wanted)| wanted[1..] == frames[1..] && is_line);
        if let Some((case, _)) = case {
            good += count;
            *seen.entry(case).or_default() += count;
            in_loop += if line > spin_line + 1 { count } else { 0 };
        } else {
            *odd.entry(stack.clone()).or_default() += count;
        }
    }
    eprintln!(
        "{version} {state}: {good} good of {all}, {without} without PHP frames, {in_loop} in the inner loop, {native} in C; {seen:?}"
    );
    let slower = u64::from(slower());
    assert!(
        all >= 300 / slower && good * 100 >= all * 99,
        "{good} of {all}: {odd:#?}\nexpected {expected:#?}"
    );
    assert!(seen.len() == CASES && seen.values().all(|count| *count >= 10 / slower), "{seen:?}");
    // Comparing and counting store no instruction: these lines are known by registers only.
    assert!(in_loop * 2 >= good - native, "{in_loop} of {good} in the inner loop");
    assert!(native >= 10, "{native} samples in a function of C that C code called");
    // The first samples come before the unwind table is built.
    assert!(without * 5 <= all * slower, "{without} of {all} without PHP frames");
    let case = if is_cached { "stacks with OPcache" } else { "stacks without OPcache" };
    proven::note("php", version, case, good, all);
}
