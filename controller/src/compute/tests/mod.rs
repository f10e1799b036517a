//! The compute API as clients see it, over a simulated host.

mod actions;
mod cloud;
mod cpus;
mod evacuate;
mod flavors;
mod images;
mod instance;
mod lists;
mod machines;
mod migration_queue;
mod migrations;
mod resize;
mod resize_faults;
mod servers;
mod shelve;
mod table;
mod usages;

use fractus_agent_api::machine::ServerId;
use http::Method;
use sea_orm::prelude::Uuid;
use serde_json::{Value, json};

use self::cloud::{Answer, Cloud, DISK, KERNEL, ONE, TWO, USER};

fn machine(id: &str) -> ServerId {
    ServerId(Uuid::parse_str(id).unwrap())
}

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value
        .as_object()
        .map(|map| map.keys().map(String::as_str).collect())
        .unwrap_or_default();
    keys.sort_unstable();
    keys
}

fn status(answer: &Answer) -> u16 {
    answer.status.as_u16()
}
