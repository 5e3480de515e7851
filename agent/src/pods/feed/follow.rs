//! Follows the first pod feed that works. When it fails, as it does while the kubelet restarts, the agent waits for the same
//! feed for a while before it tries the others, so that it does not change to and fro.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::StreamExt as _;
use tokio_util::sync::CancellationToken;

use super::{PodFeed, PodFeedError, PodFeedKind};
use crate::{cgroup::CgroupHierarchy, export::Backoff, pods::Pods};

/// Time limit for a feed's first answer, before the agent tries the next feed.
const FIRST_ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How often the agent checks for Kubernetes where nothing indicates it.
const DETECTION_PAUSE: Duration = Duration::from_secs(60);

/// The times of [`run`].
#[derive(Clone, Copy)]
struct Times {
    /// How long after its last answer the agent tries only the feed that it followed.
    patience: Duration,
    /// The longest pause between two such attempts.
    retry: Duration,
    /// How long the agent follows a feed before it tries those again that take precedence and failed.
    prefer: Duration,
}

const TIMES: Times = Times {
    patience: Duration::from_secs(120),
    retry: Duration::from_secs(3),
    prefer: Duration::from_secs(600),
};

/// Follows `feeds` until cancelled. `required`: the user has named the feed, so readiness waits for it even if nothing
/// indicates that it exists.
pub fn follow(
    pods: Pods,
    feeds: Vec<Arc<dyn PodFeed>>,
    required: bool,
    cancel: CancellationToken,
) -> impl Future<Output = ()> + Send + 'static {
    // Before the task runs, so that the node does not become ready before it waits for pods.
    detect(&pods, &feeds, required);
    run(pods, feeds, required, TIMES, cancel)
}

/// Checks whether there is a feed to follow. Readiness waits for it if so.
fn detect(pods: &Pods, feeds: &[Arc<dyn PodFeed>], required: bool) -> bool {
    let present = required || feeds.iter().any(|feed| feed.is_present());
    pods.set_active(present);
    present
}

async fn run(
    pods: Pods,
    feeds: Vec<Arc<dyn PodFeed>>,
    required: bool,
    times: Times,
    cancel: CancellationToken,
) {
    let attempts = async {
        let mut backoff = Backoff::new();
        let mut logged = false;
        // The feed that the agent followed last, and when it answered last.
        let mut worked: Option<(PodFeedKind, Instant)> = None;
        loop {
            let followed = worked.filter(|(_, at)| at.elapsed() < times.patience).map(|(kind, _)| kind);
            // The socket of a kubelet that restarts is missing for a while.
            if followed.is_none() && !detect(&pods, &feeds, required) {
                if !std::mem::replace(&mut logged, true) {
                    tracing::info!("no sign of Kubernetes on this node: profiles are without pods");
                }
                tokio::time::sleep(DETECTION_PAUSE).await;
                continue;
            }
            logged = false;
            let candidates =
                feeds.iter().filter(|feed| followed.is_none_or(|followed| feed.kind() == followed));
            match attempt(&pods, candidates, times.prefer, &mut worked).await {
                // Time to try the preferred feeds again.
                Outcome::Enough => {
                    worked = None;
                    continue;
                }
                Outcome::Failed => {}
            }
            let is_patient = worked.is_some_and(|(_, at)| at.elapsed() < times.patience);
            let pause = if is_patient {
                backoff.reset();
                times.retry.mul_f64(rand::random_range(0.3..1.0))
            } else {
                backoff.next()
            };
            tokio::time::sleep(pause).await;
        }
    };
    tokio::select! {
        () = attempts => {}
        () = pods.keep_finding_starters(CgroupHierarchy::detect()) => {}
        () = cancel.cancelled() => {}
    }
    pods.close();
}

/// How an attempt ended.
enum Outcome {
    /// No feed answered, or the followed one failed.
    Failed,
    /// The agent has followed a feed for long that is not the preferred one.
    Enough,
}

/// Tries the feeds in their order and follows the first that answers until it fails.
async fn attempt(
    pods: &Pods,
    feeds: impl Iterator<Item = &Arc<dyn PodFeed>>,
    prefer: Duration,
    worked: &mut Option<(PodFeedKind, Instant)>,
) -> Outcome {
    let mut passed_over: Vec<(PodFeedKind, String)> = Vec::new();
    for feed in feeds {
        let kind = feed.kind();
        let mut changes = feed.changes(pods.requested());
        let mut asked_at = Instant::now();
        let first = match tokio::time::timeout(FIRST_ANSWER_TIMEOUT, changes.next()).await {
            Ok(Some(Ok(change))) => Ok(change),
            Ok(Some(Err(error))) => Err(error),
            Ok(None) => Err(PodFeedError::Ended { at: kind.to_string(), said: String::new() }),
            Err(_) => {
                Err(PodFeedError::Timeout { at: kind.to_string(), seconds: FIRST_ANSWER_TIMEOUT.as_secs() })
            }
        };
        let first = match first {
            Ok(change) => change,
            Err(error) => {
                // While the agent waits for the feed that it followed, even a missing socket is a fault.
                let is_fault = worked.is_some() || !matches!(error, PodFeedError::Absent(_));
                failed(pods, kind, &error, is_fault);
                passed_over.push((kind, error.to_string()));
                pods.set_status(|status| status.passed_over.clone_from(&passed_over));
                continue;
            }
        };
        if pods.status().kind != Some(kind) {
            let why = passed_over
                .iter()
                .fold(String::new(), |text, (kind, why)| text + &format!("; not {kind}: {why}"));
            tracing::info!("pods come from {kind}{why}");
        }
        pods.set_status(|status| {
            status.kind = Some(kind);
            status.passed_over.clone_from(&passed_over);
        });
        pods.apply(first, asked_at);
        *worked = Some((kind, Instant::now()));
        let until = tokio::time::Instant::now() + prefer;
        loop {
            asked_at = Instant::now();
            let change = tokio::select! {
                change = changes.next() => change,
                () = tokio::time::sleep_until(until), if !passed_over.is_empty() => return Outcome::Enough,
            };
            // A watch on which nothing changes works until it ends.
            *worked = Some((kind, Instant::now()));
            match change {
                Some(Ok(change)) => pods.apply(change, asked_at),
                Some(Err(error)) => {
                    failed(pods, kind, &error, true);
                    return Outcome::Failed;
                }
                None => return Outcome::Failed,
            }
        }
    }
    Outcome::Failed
}

/// Counts a failure, and logs it unless the last failure was the same.
fn failed(pods: &Pods, kind: PodFeedKind, error: &PodFeedError, is_fault: bool) {
    let text = format!("{kind}: {error}");
    let mut is_new = false;
    pods.set_status(|status| {
        status.errors += u64::from(is_fault);
        is_new = is_fault && status.last_error.as_ref() != Some(&text);
        if is_fault {
            status.last_error = Some(text.clone());
        }
    });
    if is_new {
        tracing::warn!("cannot get pods from {text}");
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, sync::Mutex};

    use futures::stream::{self, BoxStream};
    use tokio::sync::Notify;

    use super::*;
    use crate::pods::{Pod, PodChange, PodContainer};

    const TIMES: Times = Times {
        patience: Duration::from_secs(3),
        retry: Duration::from_millis(100),
        prefer: Duration::from_secs(600),
    };

    /// One attempt of a feed: the lists that it sends, each as the number of its pods, until it is cut or stays open.
    #[derive(Clone)]
    enum Session {
        Refused,
        Cut(Vec<usize>),
        Open(Vec<usize>),
    }

    /// Plays sessions one after the other, the last one again and again.
    struct Script {
        kind: PodFeedKind,
        sessions: Mutex<VecDeque<Session>>,
    }

    impl Script {
        fn feed(kind: PodFeedKind, sessions: &[Session]) -> Arc<dyn PodFeed> {
            Arc::new(Self { kind, sessions: Mutex::new(sessions.to_vec().into()) })
        }
    }

    fn list(count: usize) -> PodChange {
        let pod = |number: usize| Pod {
            uid: number.to_string(),
            name: format!("pod-{number}"),
            containers: vec![PodContainer { name: "app".into(), id: format!("c{number}") }],
            ..Pod::default()
        };
        PodChange::All((0..count).map(pod).collect())
    }

    impl PodFeed for Script {
        fn kind(&self) -> PodFeedKind {
            self.kind
        }

        fn is_present(&self) -> bool {
            // The socket of a kubelet that restarts is missing.
            !matches!(self.sessions.lock().unwrap()[0], Session::Refused)
        }

        fn changes<'a>(&'a self, _: &'a Notify) -> BoxStream<'a, Result<PodChange, PodFeedError>> {
            let mut sessions = self.sessions.lock().unwrap();
            let session =
                if sessions.len() > 1 { sessions.pop_front().unwrap() } else { sessions[0].clone() };
            let lists = |counts: Vec<usize>| stream::iter(counts.into_iter().map(|count| Ok(list(count))));
            match session {
                Session::Refused => {
                    stream::iter([Err(PodFeedError::Absent("there is no socket".into()))]).boxed()
                }
                Session::Cut(counts) => lists(counts).boxed(),
                Session::Open(counts) => lists(counts).chain(stream::pending()).boxed(),
            }
        }
    }

    /// Follows the feeds for this time and returns all kinds that the agent followed, in their order.
    async fn followed(
        pods: &Pods,
        feeds: Vec<Arc<dyn PodFeed>>,
        times: Times,
        time: Duration,
    ) -> Vec<PodFeedKind> {
        let cancel = CancellationToken::new();
        let task = tokio::spawn(run(pods.clone(), feeds, false, times, cancel.clone()));
        let until = Instant::now() + time;
        let mut kinds = Vec::new();
        while Instant::now() < until {
            kinds.extend(pods.status().kind.filter(|kind| kinds.last() != Some(kind)));
            if pods.status().updates > 0 {
                assert!(pods.is_synced() && pods.is_active());
                assert!(
                    matches!(pods.look_up("c0", "0"), crate::pods::PodLookup::Known { .. }),
                    "a name is gone"
                );
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        cancel.cancel();
        task.await.unwrap();
        kinds
    }

    #[tokio::test]
    async fn a_kubelet_that_restarts_keeps_names_and_feed() {
        let pods = Pods::default();
        let mut sessions = vec![Session::Cut(vec![2])];
        // Not ready, then ready without pods, then with some of them; then cut again and again.
        sessions.extend(vec![Session::Refused; 8]);
        sessions.extend([Session::Cut(vec![]), Session::Cut(vec![0]), Session::Cut(vec![0, 1])]);
        sessions.extend(vec![Session::Cut(vec![2]); 5]);
        sessions.push(Session::Open(vec![3]));
        let stream = Script::feed(PodFeedKind::PodInfo, &sessions);
        let other = Script::feed(PodFeedKind::Kubelet, &[Session::Open(vec![2])]);
        let kinds = followed(&pods, vec![stream, other], TIMES, Duration::from_secs(4)).await;
        assert_eq!(kinds, [PodFeedKind::PodInfo]);
        assert_eq!(pods.listed().len(), 3, "{:?}", pods.status());
        assert_eq!(pods.status().last_error, None);
    }

    #[tokio::test]
    async fn the_next_feed_follows_one_that_stays_away() {
        let pods = Pods::default();
        let stream = Script::feed(PodFeedKind::PodInfo, &[Session::Cut(vec![2]), Session::Refused]);
        let other = Script::feed(PodFeedKind::Kubelet, &[Session::Open(vec![2])]);
        let times = Times { patience: Duration::from_millis(500), ..TIMES };
        let kinds = followed(&pods, vec![stream, other], times, Duration::from_secs(3)).await;
        assert_eq!(kinds, [PodFeedKind::PodInfo, PodFeedKind::Kubelet]);
    }

    #[tokio::test]
    async fn the_preferred_feed_is_tried_again() {
        let pods = Pods::default();
        let stream =
            Script::feed(PodFeedKind::PodInfo, &[Session::Refused, Session::Refused, Session::Open(vec![1])]);
        let other = Script::feed(PodFeedKind::Kubelet, &[Session::Open(vec![2])]);
        let times = Times { prefer: Duration::from_millis(500), ..TIMES };
        let kinds = followed(&pods, vec![stream, other], times, Duration::from_secs(3)).await;
        assert_eq!(kinds, [PodFeedKind::Kubelet, PodFeedKind::PodInfo]);
    }
}
