//! The readers of this crate on any bytes, for the fuzzer.

use crate::start_lines;

/// Reads the first lines of functions from a whole file.
pub fn start_lines(bytes: &[u8], addresses: &[u64]) {
    if let Some(lines) = start_lines::start_lines(bytes, addresses, 1 << 20) {
        assert_eq!(lines.len(), addresses.len());
    }
}
