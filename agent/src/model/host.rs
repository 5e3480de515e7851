//! The CPUs of the host.

use std::{fs, io};

/// The file that lists the online CPUs.
pub(crate) const ONLINE_CPUS: &str = "/sys/devices/system/cpu/online";

/// Returns the numbers of the online CPUs, ascending.
pub fn online_cpus() -> io::Result<Vec<u32>> {
    let text = fs::read_to_string(ONLINE_CPUS)?;
    parse_cpu_list(&text).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("`{}` is no list of CPUs", text.trim()))
    })
}

/// Parses a list of CPUs such as `0-3,8,10-11`.
fn parse_cpu_list(text: &str) -> Option<Vec<u32>> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        // The kernel's own limit is 8192; a wrong line must not become a long loop.
        if first > last || last > 0xffff {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_cpu_list("0\n"), Some(vec![0]));
        assert_eq!(parse_cpu_list("0-2,5,7-8\n"), Some(vec![0, 1, 2, 5, 7, 8]));
        for wrong in ["", "a", "3-1", "0-", "0,,1", "0-99999999"] {
            assert_eq!(parse_cpu_list(wrong), None, "{wrong}");
        }
    }
}
