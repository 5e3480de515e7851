//! The readers of pods on any bytes, for the fuzzer.

use gannet_proto::foreign::kubelet as wire;
use prost::Message as _;

use super::json::read_pods;
use crate::pods::model::{Pod, ReportedPod};

/// Reads the kubelet's answer in JSON. A cut answer is an error, never a shorter list.
pub fn json(bytes: &[u8]) {
    let Ok(pods) = read_pods(bytes) else { return };
    assert!(pods.pods.len() <= super::MAX_PODS);
    let end = bytes.trim_ascii_end().len();
    assert!(read_pods(&bytes[..end - 1]).is_err(), "a cut answer was read");
}

/// Reads messages of the kubelet's stream of pods.
pub fn stream(bytes: &[u8]) {
    if let Ok(pod) = wire::Pod::decode(bytes) {
        let _ = Pod::from(ReportedPod::from(pod));
    }
    if let Ok(list) = wire::ListPodsResponse::decode(bytes) {
        for pod in list.pods {
            if let Ok(pod) = wire::Pod::decode(&*pod) {
                let _ = Pod::from(ReportedPod::from(pod));
            }
        }
    }
    let _ = wire::WatchPodsEvent::decode(bytes);
}
