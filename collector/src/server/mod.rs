//! The listening sockets and the servers behind them.

pub(crate) mod grpc;
pub(crate) mod http;
pub(crate) mod listener;
