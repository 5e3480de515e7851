//! The client of the Kubernetes API.

use std::path::{Path, PathBuf};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

/// Why the collector cannot use the Kubernetes API.
#[derive(Debug, thiserror::Error)]
pub enum KubernetesError {
    /// The kubeconfig file cannot be used.
    #[error("--kubeconfig {path}: {reason}")]
    Kubeconfig {
        /// Path of the file.
        path: PathBuf,
        /// Reason why it cannot be used.
        reason: String,
    },
    /// The collector found neither a service account nor a kubeconfig file.
    #[error(
        "cannot find the Kubernetes API: run as a pod with a service account, or give --kubeconfig FILE ({0})"
    )]
    Unknown(String),
    /// The client cannot be built.
    #[error("cannot use the Kubernetes API: {0}")]
    Client(String),
}

/// Returns a client of the cluster that the kubeconfig file names. Without a file it is the cluster of the collector's
/// pod, or the current context of `kubectl`.
pub(crate) async fn client(kubeconfig: Option<&Path>) -> Result<Client, KubernetesError> {
    let config = match kubeconfig {
        None => Config::infer().await.map_err(|error| KubernetesError::Unknown(error.to_string()))?,
        Some(path) => {
            let wrong = |reason: String| KubernetesError::Kubeconfig { path: path.to_owned(), reason };
            let file = Kubeconfig::read_from(path).map_err(|error| wrong(error.to_string()))?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                .await
                .map_err(|error| wrong(error.to_string()))?
        }
    };
    Client::try_from(config).map_err(|error| KubernetesError::Client(error.to_string()))
}
