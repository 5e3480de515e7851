//! The fuzzer. `GANNET_FUZZ_TARGET` names the target; the arguments are those of libFuzzer.
#![no_main]
#![allow(missing_docs, clippy::panic, reason = "the macro makes undocumented functions")]

use std::sync::OnceLock;

use gannet_fuzz::{TARGETS, Target};

static CHOSEN: OnceLock<&Target> = OnceLock::new();

fn chosen() -> &'static Target {
    CHOSEN.get_or_init(|| {
        let name = std::env::var("GANNET_FUZZ_TARGET").unwrap_or_default();
        TARGETS.iter().find(|target| target.name == name).unwrap_or_else(|| {
            let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
            panic!("GANNET_FUZZ_TARGET is {name:?}; the targets are {}", names.join(" "))
        })
    })
}

libfuzzer_sys::fuzz_target!(init: { chosen(); }, |bytes: &[u8]| (chosen().run)(bytes));
