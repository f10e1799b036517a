//! Which cloud, and as whom: flags, then OS_* variables, then clouds.yaml with secure.yaml, as every
//! OpenStack client reads them.
//!
//! clouds.yaml is looked for in the current folder, `$XDG_CONFIG_HOME/openstack` (or
//! `~/.config/openstack`) and `/etc/openstack`; `OS_CLIENT_CONFIG_FILE` names one outright.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::CliError;
use super::arguments::CloudArguments;

/// Variables and folders that the configuration is read from; tests make their own.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    pub variables: BTreeMap<String, String>,
    /// Where clouds.yaml may be, best first.
    pub folders: Vec<PathBuf>,
}

impl Environment {
    pub fn of_process() -> Self {
        let variables: BTreeMap<String, String> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        let home = variables
            .get("XDG_CONFIG_HOME")
            .map(PathBuf::from)
            .or_else(|| Some(Path::new(variables.get("HOME")?).join(".config")));
        let folders = std::iter::once(PathBuf::from("."))
            .chain(home.map(|home| home.join("openstack")))
            .chain([PathBuf::from("/etc/openstack")])
            .collect();
        Self { variables, folders }
    }

    fn variable(&self, name: &str) -> Option<String> {
        self.variables
            .get(name)
            .filter(|value| !value.is_empty())
            .cloned()
    }
}

/// A cloud and a user of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// With its version: `…/v3`.
    pub auth_url: String,
    pub login: Login,
    pub region: Option<String>,
    /// `public`, `internal` or `admin`.
    pub interface: String,
    pub cacert: Option<PathBuf>,
    pub verify: bool,
    pub compute_api_version: Option<String>,
    /// Endpoints that stand before the catalogue's, by service type.
    pub endpoints: BTreeMap<String, String>,
}

/// The body's `auth` of `POST /v3/auth/tokens`.
#[derive(Debug, Clone, PartialEq)]
pub struct Login(pub Value);

/// Settings by the names that clouds.yaml has for them (`auth.username`).
type Settings = BTreeMap<String, String>;

pub fn load(flags: &CloudArguments, environment: &Environment) -> Result<Config, CliError> {
    let mut settings = Settings::new();
    let cloud = flags
        .os_cloud
        .clone()
        .or_else(|| environment.variable("OS_CLOUD"));
    if let Some(name) = &cloud {
        settings.extend(from_file(name, environment)?);
    }
    settings.extend(from_variables(environment));
    settings.extend(from_flags(flags));
    if !settings.contains_key("auth.auth_url") {
        return Err(CliError::NoCloud);
    }
    resolve(settings)
}

fn from_flags(flags: &CloudArguments) -> Settings {
    let cacert = flags
        .os_cacert
        .as_ref()
        .map(|path| path.display().to_string());
    [
        ("auth.auth_url", flags.os_auth_url.clone()),
        ("auth.username", flags.os_username.clone()),
        ("auth.project_name", flags.os_project_name.clone()),
        ("region_name", flags.os_region_name.clone()),
        ("cacert", cacert),
        ("verify", flags.insecure.then(|| "false".to_owned())),
        ("compute_api_version", flags.os_compute_api_version.clone()),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name.to_owned(), value?)))
    .collect()
}

/// Settings of the cloud itself; every other OS_* variable is about logging in (`OS_USER_DOMAIN_NAME`
/// is `auth.user_domain_name`).
const OF_THE_CLOUD: &[&str] = &[
    "region_name",
    "interface",
    "cacert",
    "insecure",
    "compute_api_version",
    "auth_type",
    "verify",
];

fn from_variables(environment: &Environment) -> Settings {
    let mut settings = Settings::new();
    for (name, value) in &environment.variables {
        let Some(name) = name.strip_prefix("OS_").filter(|_| !value.is_empty()) else {
            continue;
        };
        let name = name.to_ascii_lowercase();
        match name.as_str() {
            "cloud" | "client_config_file" => {}
            "tenant_name" => {
                settings
                    .entry("auth.project_name".into())
                    .or_insert_with(|| value.clone());
            }
            "tenant_id" => {
                settings
                    .entry("auth.project_id".into())
                    .or_insert_with(|| value.clone());
            }
            "endpoint_type" => {
                settings.insert("interface".into(), value.trim_end_matches("URL").to_owned());
            }
            "insecure" => {
                settings.insert("verify".into(), (!truth(value)).to_string());
            }
            name if OF_THE_CLOUD.contains(&name) || name.ends_with("_endpoint_override") => {
                settings.insert(name.to_owned(), value.clone());
            }
            name => {
                settings.insert(format!("auth.{name}"), value.clone());
            }
        }
    }
    settings
}

fn truth(text: &str) -> bool {
    matches!(
        text.to_ascii_lowercase().as_str(),
        "1" | "true" | "yes" | "on"
    )
}

fn from_file(cloud: &str, environment: &Environment) -> Result<Settings, CliError> {
    let named = environment
        .variable("OS_CLIENT_CONFIG_FILE")
        .map(PathBuf::from);
    let candidates: Vec<PathBuf> = match named {
        Some(path) => vec![path],
        None => environment
            .folders
            .iter()
            .flat_map(|folder| [folder.join("clouds.yaml"), folder.join("clouds.yml")])
            .collect(),
    };
    let places: Vec<String> = candidates
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    let Some(path) = candidates.iter().find(|path| path.is_file()) else {
        return Err(CliError::UnknownCloud {
            name: cloud.to_owned(),
            places,
            known: Vec::new(),
        });
    };
    let mut clouds = read_clouds(path)?;
    let secure = path.with_file_name("secure.yaml");
    if secure.is_file() {
        merge(&mut clouds, read_clouds(&secure)?);
    }
    let Some(found) = clouds.get(cloud) else {
        let known = clouds
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, _)| name.clone())
            .collect();
        let places = vec![path.display().to_string()];
        return Err(CliError::UnknownCloud {
            name: cloud.to_owned(),
            places,
            known,
        });
    };
    let mut settings = Settings::new();
    flatten("", found, &mut settings);
    if let Some(first) = found.pointer("/regions/0") {
        let name = first
            .as_str()
            .or_else(|| first["name"].as_str())
            .unwrap_or_default();
        settings
            .entry("region_name".into())
            .or_insert_with(|| name.to_owned());
    }
    Ok(settings)
}

fn read_clouds(path: &Path) -> Result<Value, CliError> {
    let text = std::fs::read_to_string(path).map_err(|error| CliError::File {
        path: path.to_owned(),
        error,
    })?;
    let file: Value = serde_yaml_ng::from_str(&text).map_err(|error| CliError::Configuration {
        what: format!("{} is no clouds.yaml: {error}", path.display()),
        help: "see https://docs.openstack.org/python-openstackclient/latest/configuration/".into(),
    })?;
    Ok(file.get("clouds").cloned().unwrap_or(Value::Null))
}

fn merge(into: &mut Value, more: Value) {
    match (into, more) {
        (Value::Object(into), Value::Object(more)) => {
            for (name, value) in more {
                merge(into.entry(name).or_insert(Value::Null), value);
            }
        }
        (into, Value::Null) if !into.is_null() => {}
        (into, more) => *into = more,
    }
}

fn flatten(at: &str, value: &Value, into: &mut Settings) {
    let name = |inner: &str| {
        if at.is_empty() {
            inner.to_owned()
        } else {
            format!("{at}.{inner}")
        }
    };
    match value {
        Value::Object(fields) => {
            for (inner, value) in fields {
                flatten(&name(inner), value, into);
            }
        }
        Value::String(text) => {
            into.insert(at.to_owned(), text.clone());
        }
        Value::Bool(_) | Value::Number(_) => {
            into.insert(at.to_owned(), value.to_string());
        }
        Value::Null | Value::Array(_) => {}
    }
}

fn resolve(settings: Settings) -> Result<Config, CliError> {
    let get = |name: &str| {
        settings
            .get(name)
            .filter(|value| !value.is_empty())
            .cloned()
    };
    let mut auth_url = get("auth.auth_url")
        .unwrap_or_default()
        .trim_end_matches('/')
        .to_owned();
    if !(auth_url.starts_with("http://") || auth_url.starts_with("https://")) {
        return Err(CliError::Configuration {
            what: format!("{auth_url:?} is no URL"),
            help: "OS_AUTH_URL should look like https://HOST:PORT/identity/v3".into(),
        });
    }
    if !auth_url.ends_with("/v3") {
        auth_url.push_str("/v3");
    }
    let endpoints = settings
        .iter()
        .filter_map(|(name, url)| {
            let service = name.strip_suffix("_endpoint_override")?.replace('_', "-");
            Some((service, url.trim_end_matches('/').to_owned()))
        })
        .collect();
    Ok(Config {
        auth_url,
        login: login(&settings)?,
        region: get("region_name"),
        interface: get("interface").unwrap_or_else(|| "public".to_owned()),
        cacert: get("cacert").map(PathBuf::from),
        verify: get("verify").is_none_or(|value| truth(&value)),
        compute_api_version: get("compute_api_version").filter(|version| version.contains('.')),
        endpoints,
    })
}

fn login(settings: &Settings) -> Result<Login, CliError> {
    let get = |name: &str| {
        settings
            .get(name)
            .filter(|value| !value.is_empty())
            .cloned()
    };
    let auth = |name: &str| get(&format!("auth.{name}"));
    let kind = get("auth_type").unwrap_or_else(|| {
        let first = if auth("application_credential_secret").is_some() {
            "v3applicationcredential"
        } else if auth("token").is_some() && auth("password").is_none() {
            "v3token"
        } else {
            "v3password"
        };
        first.to_owned()
    });
    let missing = |what: &str| CliError::Configuration {
        what: format!("{what} is missing"),
        help: format!(
            "set OS_{}, or {what} under auth of the cloud in clouds.yaml",
            what.to_ascii_uppercase()
        ),
    };
    let domain = |prefix: &str| domain(settings, prefix);
    let user = || match (auth("user_id"), auth("username")) {
        (Some(id), _) => Ok(json!({"id": id})),
        (None, Some(name)) => Ok(json!({"name": name, "domain": domain("user")})),
        (None, None) => Err(missing("username")),
    };
    match kind.as_str() {
        "v3applicationcredential" | "applicationcredential" => {
            let secret = auth("application_credential_secret")
                .ok_or_else(|| missing("application_credential_secret"))?;
            let credential = match auth("application_credential_id") {
                Some(id) => json!({"id": id, "secret": secret}),
                None => {
                    let name = auth("application_credential_name")
                        .ok_or_else(|| missing("application_credential_id"))?;
                    json!({"name": name, "secret": secret, "user": user()?})
                }
            };
            Ok(Login(json!({"identity": {
                "methods": ["application_credential"], "application_credential": credential}})))
        }
        "token" | "v3token" => {
            let token = auth("token").ok_or_else(|| missing("token"))?;
            let identity = json!({"methods": ["token"], "token": {"id": token}});
            Ok(Login(scoped(json!({"identity": identity}), settings)))
        }
        "password" | "v3password" => {
            let mut user = user()?;
            user["password"] = Value::String(auth("password").ok_or_else(|| missing("password"))?);
            let identity = json!({"methods": ["password"], "password": {"user": user}});
            Ok(Login(scoped(json!({"identity": identity}), settings)))
        }
        other => Err(CliError::Configuration {
            what: format!("auth_type {other:?} is not known"),
            help: "v3password, v3token and v3applicationcredential are".into(),
        }),
    }
}

fn domain(settings: &Settings, prefix: &str) -> Value {
    let get = |name: String| settings.get(&format!("auth.{name}")).cloned();
    if let Some(id) = get(format!("{prefix}_domain_id")) {
        return json!({"id": id});
    }
    if let Some(name) = get(format!("{prefix}_domain_name")) {
        return json!({"name": name});
    }
    json!({"id": get("default_domain".to_owned()).unwrap_or_else(|| "default".to_owned())})
}

/// Adds the scope: project, domain, the whole system, or none.
fn scoped(mut auth: Value, settings: &Settings) -> Value {
    let get = |name: &str| {
        settings
            .get(&format!("auth.{name}"))
            .filter(|value| !value.is_empty())
    };
    let scope = if let Some(id) = get("project_id") {
        json!({"project": {"id": id}})
    } else if let Some(name) = get("project_name") {
        json!({"project": {"name": name, "domain": domain(settings, "project")}})
    } else if let Some(id) = get("domain_id") {
        json!({"domain": {"id": id}})
    } else if let Some(name) = get("domain_name") {
        json!({"domain": {"name": name}})
    } else if get("system_scope").is_some() {
        json!({"system": {"all": true}})
    } else {
        return auth;
    };
    auth["scope"] = scope;
    auth
}
