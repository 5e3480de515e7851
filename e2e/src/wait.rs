//! Waits for a condition, not for a time.

use std::time::{Duration, Instant};

/// Calls `ask` every 20 ms until it returns a value; panics with `what` after a minute.
pub async fn eventually<T>(what: &str, ask: impl AsyncFnMut() -> Option<T>) -> T {
    eventually_within(Duration::from_secs(60), what, ask).await
}

/// Calls `ask` every 20 ms until it returns a value; panics with `what` after `timeout`.
pub async fn eventually_within<T>(
    timeout: Duration,
    what: &str,
    mut ask: impl AsyncFnMut() -> Option<T>,
) -> T {
    let begin = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(begin.elapsed() < timeout, "not within {timeout:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
