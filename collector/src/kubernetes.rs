//! The Kubernetes API, as far as the collector needs it.

use std::path::{Path, PathBuf};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

/// Why the API cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KubernetesError {
    /// The file that says how to reach it.
    #[error("--kubeconfig {path}: {reason}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// In which way it is wrong.
        reason: String,
    },
    /// Nothing says how to reach it.
    #[error(
        "no way to the Kubernetes API is known: run as a pod with a service account, or give --kubeconfig FILE ({0})"
    )]
    Unknown(String),
    /// It cannot be dialled.
    #[error("the Kubernetes API cannot be used: {0}")]
    Client(String),
}

/// A client of the cluster that this program runs in, or that the file names.
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
