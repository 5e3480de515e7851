use clap::{CommandFactory as _, FromArgMatches as _, Parser};

use super::*;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    run: RunOptions,
}

/// Reads the flags after `--config` with a file of this content.
fn load(file: &str, flags: &[&str]) -> Result<RunOptions, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.yaml");
    std::fs::write(&path, file).unwrap();
    let words = [&["run", "--config", path.to_str().unwrap()], flags].concat();
    let matches = Cli::command().try_get_matches_from(words).unwrap();
    Cli::from_arg_matches(&matches).unwrap().run.load(&matches)
}

fn with(file: &str, flags: &[&str]) -> Result<Config, ConfigError> {
    load(file, flags)?.complete()
}

#[test]
fn a_flag_takes_precedence_over_file_and_default() {
    let config = with("node: of-file\nspool_bytes: 1MiB\nwindow: 5s\n", &["--node", "of-flag"]).unwrap();
    assert_eq!(config.node, "of-flag");
    let options = &config.options;
    assert_eq!((options.spool_bytes, options.window), (ByteSize(1 << 20), TimeSpan::from_secs(5)));
    assert_eq!(config.table_bytes, 16 << 20);
    assert_eq!(options.http_listen.to_string(), ports::AGENT_PROBES);
    assert_eq!(options.debug_listen.to_string(), ports::AGENT_DEBUG);
}

#[test]
fn a_wrong_value_is_named_with_its_cure() {
    for (file, flags, words) in [
        ("nodes: x\n", &[][..], "line 1 column 1: unknown key `nodes`"),
        ("\ncollector: x\n", &[], "line 2 column 1: `collector` is now `endpoint`"),
        ("listen: x\n", &[], "`listen` is now `http_listen`"),
        ("kubelet: none\n", &[], "`kubelet` is now `pod_source`"),
        ("hz_max: 9\n", &[], "`hz_max` is now `max_hz`"),
        ("window: fast\n", &[], "window"),
        ("", &["--debug-listen", "0.0.0.0:6060"], "loopback"),
        ("", &["--max-hz", "5000"], "1 to 1000"),
        ("", &["--window", "1ms"], "1s to 10m"),
        ("", &["--ring-bytes", "1KiB"], "128KiB"),
        ("", &["--label", "x"], "NAME=VALUE"),
        ("", &["--kubelet-address", "http://10.0.0.1"], "HOST:PORT"),
        ("", &["--pod-label", "a b"], "key of a label"),
        ("", &["--pod-label", "a,b,c,d,e,f,g,h,i,j,k"], "at most 10"),
        ("", &["--deny-comm", "sixteen-bytes-ab"], "prefix"),
        ("deny_cgroup: [a/b]\n", &[], "beginning with /"),
    ] {
        let error = with(file, flags).unwrap_err().to_string();
        assert!(error.contains(words), "{file}{flags:?}: {error}");
    }
}

#[test]
fn the_file_cannot_be_undenied_by_a_flag() {
    let config = with("deny_uid: [1]\ndeny_comm: [sshd]\n", &["--deny-uid", "2"]).unwrap();
    assert_eq!(config.deny.uid, [2, 1]);
    assert_eq!(config.deny.comm.iter().map(ToString::to_string).collect::<Vec<_>>(), ["sshd"]);
}

/// Checks that the agent follows processes unless an option switches that off (R26).
#[test]
fn processes_are_followed_unless_switched_off() {
    assert!(with("", &[]).unwrap().options.lifecycle);
    let off = with("lifecycle: false\n", &[]).unwrap();
    assert!(!off.options.lifecycle);
    assert!(off.options.to_yaml().unwrap().contains("lifecycle: false\n"));
    assert!(with("lifecycle: false\n", &["--lifecycle", "true"]).unwrap().options.lifecycle);
    assert!(!with("", &["--lifecycle", "false"]).unwrap().options.lifecycle);
}

#[test]
fn pods_come_from_the_source_of_the_option() {
    let pods = |flags: &[&str]| with("", flags).unwrap().pods;
    assert_eq!(pods(&["--pod-source", "none"]), None);
    assert_eq!(pods(&["--pod-source", "kubelet"]).unwrap().only, Some(PodFeedKind::Kubelet));
    let auto = pods(&["--node", "worker-1", "--kubelet-address", "fd00::1"]).unwrap();
    assert_eq!((auto.only, auto.node.as_str()), (None, "worker-1"));
    assert_eq!(auto.token_file.to_str(), Some(SERVICE_ACCOUNT_TOKEN));
    let config = with("pod_label: [team]\ncluster: east\n", &[]).unwrap();
    assert_eq!((config.pod_labels.cluster.as_str(), config.pod_labels.pod_labels.len()), ("east", 1));
    let yaml = config.options.to_yaml().unwrap();
    assert!(yaml.contains("pod_source: auto\n") && yaml.contains("pod_label:\n- team\n"), "{yaml}");
}

#[test]
fn a_share_of_a_core_is_a_number_or_a_percentage() {
    assert_eq!("5%".parse(), Ok(CoreShare(0.05)));
    assert_eq!("0.05".parse(), Ok(CoreShare(0.05)));
    for wrong in ["", "%", "0", "-1", "100", "five", "NaN"] {
        assert!(wrong.parse::<CoreShare>().is_err(), "{wrong}");
    }
    let config = with("cpu_budget: 10%\nmemory_budget: 64MiB\n", &["--cpu-budget", "0.2"]).unwrap();
    assert_eq!(config.budgets, Budgets { cpu: Some(0.2), memory_bytes: Some(64 << 20) });
}

/// Checks that the printed options are a file that gives the same options, also after they were completed.
#[test]
fn the_printed_options_read_back_as_themselves() {
    let flags =
        ["--endpoint", "https://c:4100", "--deny-comm", "a*,b", "--label", "x=1", "--cpu-budget", "5%"];
    for options in [RunOptions::default(), load("window: 90s\nring_bytes: 4MiB\n", &flags).unwrap()] {
        assert_eq!(load(&options.to_yaml().unwrap(), &[]).unwrap(), options);
        let completed = options.complete().unwrap().options;
        assert_eq!(load(&completed.to_yaml().unwrap(), &[]).unwrap(), completed);
    }
}

#[test]
fn no_old_name_is_a_name_today() {
    let mut command = Cli::command();
    command.build();
    for arg in command.get_arguments() {
        let flag = format!("--{}", arg.get_long().unwrap_or_default());
        assert!(RENAMED.flags.iter().all(|(old, _)| *old != flag), "{flag}");
        let variable = arg.get_env().unwrap_or_default().to_string_lossy();
        assert!(RENAMED.variables.iter().all(|(old, _)| *old != variable), "{variable}");
    }
}
