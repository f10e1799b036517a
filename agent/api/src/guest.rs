//! What a machine's guest is told and how it is treated: its instance data (config drive, and
//! metadata service once there is one), how long it may take to shut down, its watchdog, its agent.
//!
//! Owns the layout of the instance data by path and version, which is nova's: one document, many
//! paths. Must never hold a secret that the controller has not been asked to give.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Part of [`crate::machine::MachineSpec`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct GuestOptions {
    /// What the config drive says; none: no drive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<Box<InstanceData>>,
    /// How long the guest may take to go after its power button was pressed, seconds; 0: it is not
    /// asked. None: the agent's own default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shutdown_timeout_s: Option<u32>,
    /// None: the machine has no watchdog.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<Watchdog>,
    /// The port `org.qemu.guest_agent.0` of the QEMU guest agent.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub agent: bool,
}

/// What happens when the guest has stopped to feed its watchdog.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Watchdog {
    Reset,
    PowerOff,
    Pause,
    /// It is reported, and nothing is done.
    Report,
}

/// What a guest's own devices have said since its process was started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestReport {
    /// Its kernel said that it panicked, and the guest has not been reset since.
    #[serde(default)]
    pub panicked: bool,
    /// How often it let its watchdog run out; not counted more than once in ten seconds.
    #[serde(default)]
    pub watchdog_fired: u64,
}

/// What a guest may know of its own server.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct InstanceData {
    /// `meta_data.json` at its newest version, without `random_seed` (the host's own), `admin_pass`
    /// and `files`.
    pub meta_data: BTreeMap<String, Value>,
    /// Base64, as it was given.
    #[serde(default)]
    pub user_data: Option<String>,
    #[serde(default)]
    pub vendor_data: Value,
    #[serde(default)]
    pub vendor_data2: Value,
    #[serde(default)]
    pub network_data: Value,
    /// `ec2/*/meta-data.json`.
    #[serde(default)]
    pub ec2: Value,
    /// Files that the guest is to put into its own file system ("personality", up to 2.56).
    #[serde(default)]
    pub files: Vec<InjectedFile>,
    /// A secret: the controller keeps it sealed and opens it for the host alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin_pass: Option<String>,
}

impl std::fmt::Debug for InstanceData {
    /// User data, passwords and files are nobody's who reads logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InstanceData").finish_non_exhaustive()
    }
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InjectedFile {
    /// In the guest.
    pub path: String,
    /// Base64.
    pub contents: String,
}

/// Most bytes of all parts together, as they come over the wire.
pub const MOST: usize = 512 << 10;

/// Nova's versions of the metadata: when which field or file came.
const VERSIONS: [&str; 10] = [
    "2012-08-10",
    "2013-04-04",
    "2013-10-17",
    "2015-10-15",
    "2016-06-30",
    "2016-10-06",
    "2017-02-22",
    "2018-08-27",
    "2020-10-14",
    "latest",
];
const EC2_VERSIONS: [&str; 2] = ["2009-04-04", "latest"];
/// Fields of `meta_data.json` by the version that brought them; others were always there.
const FIELDS: [(&str, &str); 4] = [
    ("random_seed", "2013-04-04"),
    ("project_id", "2015-10-15"),
    ("devices", "2016-06-30"),
    ("dedicated_cpus", "2020-10-14"),
];

#[derive(Debug, thiserror::Error)]
#[error("{what} of the server's instance data is not base64")]
pub struct NotBase64 {
    what: &'static str,
}

impl InstanceData {
    /// Bytes that it takes on the wire, about.
    pub fn weight(&self) -> usize {
        let files = self.files.iter();
        let files: usize = files
            .map(|file| file.path.len() + file.contents.len())
            .sum();
        let documents = [
            json!(self.meta_data).to_string().len(),
            self.vendor_data.to_string().len(),
            self.vendor_data2.to_string().len(),
            self.network_data.to_string().len(),
            self.ec2.to_string().len(),
        ];
        let user_data = self.user_data.as_ref().map_or(0, String::len);
        files + documents.iter().sum::<usize>() + user_data
    }

    /// Every file of a config drive, by its path. `seed` is what the guest's random numbers begin
    /// with, base64.
    pub fn layout(&self, seed: &str) -> Result<BTreeMap<String, Vec<u8>>, NotBase64> {
        let user_data = match &self.user_data {
            Some(text) => Some(decode(text, "user data")?),
            None => None,
        };
        let mut layout = BTreeMap::new();
        for version in EC2_VERSIONS {
            let folder = format!("ec2/{version}");
            layout.insert(format!("{folder}/meta-data.json"), bytes(&self.ec2));
            if let Some(user_data) = &user_data {
                layout.insert(format!("{folder}/user-data"), user_data.clone());
            }
        }
        for version in VERSIONS {
            let folder = format!("openstack/{version}");
            let meta_data = self.meta_data_of(version, seed);
            layout.insert(format!("{folder}/meta_data.json"), bytes(&meta_data));
            if let Some(user_data) = &user_data {
                layout.insert(format!("{folder}/user_data"), user_data.clone());
            }
            let documents = [
                ("vendor_data.json", "2013-10-17", &self.vendor_data),
                ("network_data.json", "2015-10-15", &self.network_data),
                ("vendor_data2.json", "2016-10-06", &self.vendor_data2),
            ];
            for (name, since, document) in documents {
                if version >= since {
                    layout.insert(format!("{folder}/{name}"), bytes(document));
                }
            }
        }
        for (index, file) in self.files.iter().enumerate() {
            let contents = decode(&file.contents, "a file")?;
            layout.insert(format!("openstack{}", content_path(index)), contents);
        }
        Ok(layout)
    }

    /// `meta_data.json` of one version; `latest` sorts after every date.
    fn meta_data_of(&self, version: &str, seed: &str) -> Value {
        let mut fields = self.meta_data.clone();
        fields.insert("random_seed".to_owned(), json!(seed));
        if let Some(password) = &self.admin_pass {
            fields.insert("admin_pass".to_owned(), json!(password));
        }
        if !self.files.is_empty() {
            let files = self.files.iter().enumerate();
            let files: Vec<Value> = files
                .map(
                    |(index, file)| json!({"path": file.path, "content_path": content_path(index)}),
                )
                .collect();
            fields.insert("files".to_owned(), json!(files));
        }
        for (field, since) in FIELDS {
            if version < since {
                fields.remove(field);
            }
        }
        json!(fields)
    }
}

fn content_path(index: usize) -> String {
    format!("/content/{index:04}")
}

fn bytes(document: &Value) -> Vec<u8> {
    match document {
        Value::Null => b"{}".to_vec(),
        document => document.to_string().into_bytes(),
    }
}

/// The bytes of base64 that a user gave, in lines or not; none if it is not base64. What the API took
/// by this a host can lay out.
pub fn decoded(text: &str) -> Option<Vec<u8>> {
    let packed: String = text.split_whitespace().collect();
    STANDARD.decode(packed).ok()
}

fn decode(text: &str, what: &'static str) -> Result<Vec<u8>, NotBase64> {
    decoded(text).ok_or(NotBase64 { what })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_may_be_broken_by_any_blanks_and_nothing_else() {
        for text in ["aGk=", " aG\nk= ", "aG\u{b}k=", "aG\u{a0}k=\u{85}"] {
            assert_eq!(decoded(text).as_deref(), Some(&b"hi"[..]), "{text:?}");
        }
        for text in ["aGk", "a-k=", "aG\u{0}k="] {
            assert_eq!(decoded(text), None, "{text:?}");
        }
    }

    fn data() -> InstanceData {
        let meta_data = json!({"uuid": "u", "project_id": "p", "devices": []});
        InstanceData {
            meta_data: serde_json::from_value(meta_data).unwrap(),
            user_data: Some("I2Nsb3Vk\nLWNvbmZpZw==".to_owned()),
            vendor_data: json!({}),
            vendor_data2: json!({"static": {}}),
            network_data: json!({"links": []}),
            ec2: json!({"instance-id": "i-1"}),
            files: vec![InjectedFile {
                path: "/etc/motd".to_owned(),
                contents: "aGk=".to_owned(),
            }],
            admin_pass: Some("secret".to_owned()),
        }
    }

    fn document(layout: &BTreeMap<String, Vec<u8>>, path: &str) -> Value {
        serde_json::from_slice(&layout[path]).unwrap()
    }

    #[test]
    fn each_version_has_the_files_and_fields_that_nova_gave_it() {
        let layout = data().layout("c2VlZA==").unwrap();
        let latest = document(&layout, "openstack/latest/meta_data.json");
        assert_eq!(latest["random_seed"], "c2VlZA==");
        assert_eq!(latest["project_id"], "p");
        assert_eq!(latest["admin_pass"], "secret");
        assert_eq!(latest["files"][0]["content_path"], "/content/0000");
        let oldest = document(&layout, "openstack/2012-08-10/meta_data.json");
        assert_eq!(oldest["uuid"], "u");
        assert!(oldest.get("random_seed").is_none() && oldest.get("project_id").is_none());
        assert_eq!(layout["openstack/latest/user_data"], b"#cloud-config");
        assert_eq!(layout["openstack/content/0000"], b"hi");
        assert!(layout.contains_key("openstack/2013-10-17/vendor_data.json"));
        assert!(!layout.contains_key("openstack/2013-10-17/network_data.json"));
        assert!(!layout.contains_key("openstack/2016-06-30/vendor_data2.json"));
        assert!(layout.contains_key("openstack/2016-10-06/vendor_data2.json"));
        assert_eq!(layout["ec2/2009-04-04/user-data"], b"#cloud-config");
    }

    #[test]
    fn what_is_no_base64_is_refused_and_nothing_of_it_is_shown() {
        let mut bad = data();
        bad.user_data = Some("no base64!".to_owned());
        let error = bad.layout("").unwrap_err().to_string();
        assert_eq!(
            error,
            "user data of the server's instance data is not base64"
        );
        assert!(!format!("{:?}", data()).contains("secret"));
    }
}
