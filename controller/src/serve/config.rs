//! What can be configured: flags, environment variables (FRACTUS_*), and a YAML file, in this order.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use fractus_agent_api::migration::MOST_LANES;
use serde::Deserialize;

use super::size::Size;
use crate::compute::model::cpu::CpuMode;
use crate::http::PublicUrl;
use crate::image::Limits;
use crate::reconcile::MIGRATIONS_PER_HOST;

/// Flags of `fractus serve`; the file has the same names.
#[derive(Debug, Clone, Default, clap::Args, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Options {
    /// YAML file with these same options (names without the dashes in front).
    #[arg(long, env = "FRACTUS_CONFIG")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Folder for the database, keys and images [default: /var/lib/fractus].
    #[arg(long, env = "FRACTUS_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// Address and port of the public API [default: 127.0.0.1:8443].
    #[arg(long, env = "FRACTUS_LISTEN")]
    pub listen: Option<String>,
    /// Where clients reach the API, such as https://cloud.example [default: from --listen].
    #[arg(long, env = "FRACTUS_PUBLIC_URL")]
    pub public_url: Option<String>,
    /// sqlite:///PATH or postgres://... [default: a file in the state folder].
    #[arg(long, env = "FRACTUS_DATABASE")]
    pub database: Option<String>,
    /// Certificate (with its chain, PEM) of the public API [default: one of its own].
    #[arg(long, env = "FRACTUS_TLS_CERTIFICATE", requires = "tls_key")]
    pub tls_certificate: Option<PathBuf>,
    /// Key of that certificate, PEM.
    #[arg(long, env = "FRACTUS_TLS_KEY", requires = "tls_certificate")]
    pub tls_key: Option<PathBuf>,
    /// Speak HTTP without TLS: for a loopback address only, or behind a proxy.
    #[arg(long, env = "FRACTUS_PLAIN_HTTP")]
    pub plain_http: bool,
    /// A proxy in front ends TLS: plain HTTP is then allowed on any address.
    #[arg(long, env = "FRACTUS_BEHIND_PROXY")]
    pub behind_proxy: bool,
    /// Address and port of the listener for agents [default: 0.0.0.0:8444].
    #[arg(long, env = "FRACTUS_AGENTS_LISTEN")]
    pub agents_listen: Option<String>,
    /// How agents reach that listener, https://NAME:PORT [default: from --agents-listen].
    #[arg(long, env = "FRACTUS_AGENTS_URL")]
    pub agents_url: Option<String>,
    /// Name of this controller among those of the cloud: letters, digits and `-` [default: the
    /// host's name].
    #[arg(long, env = "FRACTUS_NAME")]
    pub name: Option<String>,
    /// Address and port of metrics and health, not public [default: 127.0.0.1:9464; empty: none].
    #[arg(long, env = "FRACTUS_METRICS_LISTEN")]
    pub metrics_listen: Option<String>,
    /// Largest image, such as 10GiB [default: 1TiB].
    #[arg(long, env = "FRACTUS_IMAGE_SIZE_LIMIT")]
    pub image_size_limit: Option<Size>,
    /// What all images of one project may take together, such as 200GiB [default: no limit].
    #[arg(long, env = "FRACTUS_IMAGE_PROJECT_LIMIT")]
    pub image_project_limit: Option<Size>,
    /// What uploads leave free on the file system of the images [default: 1GiB].
    #[arg(long, env = "FRACTUS_IMAGE_RESERVE")]
    pub image_reserve: Option<Size>,
    /// Servers that were resized, or migrated with their guest stopped, stay so after this many seconds if nobody has said
    /// otherwise [default: 0: they wait].
    #[arg(long, env = "FRACTUS_RESIZE_CONFIRM_WINDOW")]
    pub resize_confirm_window: Option<u32>,
    /// What CPU guests have whose flavors do not say it (`hw:cpu_profile`): what all enabled hosts of one make have in
    /// common (baseline), all that their host has (host), or a level (x86-64-v2, x86-64-v3) [default: baseline].
    #[arg(long, env = "FRACTUS_CPU_PROFILE", value_name = "PROFILE")]
    pub cpu_profile: Option<CpuMode>,
    /// A guest that writes faster than it is copied to another host, or whose live migration is completed by force, goes on
    /// there while its memory is still coming. It stands still for less time, and is lost if either host fails meanwhile.
    /// A flavor's `hw:live_migration_post_copy` (true, false) says so for its servers.
    #[arg(long, env = "FRACTUS_POST_COPY")]
    #[serde(default)]
    pub post_copy: bool,
    /// A guest that writes faster than it is copied to another host is slowed down, as far as it takes to catch up with it;
    /// otherwise it stands still for as long as the rest takes [default: true]. A flavor's
    /// `hw:live_migration_auto_converge` (true, false) says so for its servers.
    #[arg(long, env = "FRACTUS_AUTO_CONVERGE", num_args = 0..=1, default_missing_value = "true")]
    pub auto_converge: Option<bool>,
    /// Connections by which a guest's memory goes to another host at once, 1 to 8 [default: 1]. Each is a thread on both
    /// hosts, which seals and copies about a gigabyte a second, on processors that guests have then less of: for networks
    /// that are faster than one such.
    #[arg(long, env = "FRACTUS_MIGRATION_CONNECTIONS", value_name = "N", value_parser = clap::value_parser!(u8).range(1..=MOST_LANES as i64))]
    pub migration_connections: Option<u8>,
    /// Live migrations from one host, or to it, at once; others wait for their turn [default: 2]. Evacuations, and
    /// servers whose guest is stopped, are not counted.
    #[arg(long, env = "FRACTUS_MIGRATIONS_PER_HOST", value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub migrations_per_host: Option<u16>,
    /// The database was restored from a backup: say it at the first start after that, and only then.
    /// What hosts were told since the backup is then known to be older than what they are told now, and
    /// no server is started before its host has said that it still has it; one that is gone is ERROR. Which
    /// hosts are off is to be said anew, and images' bytes that no row names are kept as `images/unnamed-*`.
    #[arg(long)]
    #[serde(skip)]
    pub restored: bool,
}

/// Where the public certificate comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TlsSource {
    /// Made once, kept in the state folder.
    Own,
    Given {
        certificate: PathBuf,
        key: PathBuf,
    },
}

/// The configuration with all defaults filled in.
#[derive(Debug, Clone)]
pub struct Config {
    pub state_dir: PathBuf,
    pub listen: String,
    pub public_url: PublicUrl,
    pub database: String,
    /// `None`: plain HTTP.
    pub tls: Option<TlsSource>,
    pub metrics_listen: Option<String>,
    pub agents_listen: SocketAddr,
    pub agents_url: String,
    pub name: String,
    pub image_limits: Limits,
    /// After which a server that could go back is confirmed; none: never.
    pub resize_confirm_window: Option<Duration>,
    /// Of guests whose flavors do not say it.
    pub cpu_mode: CpuMode,
    /// Of guests whose flavors do not say it.
    pub post_copy: bool,
    /// The same.
    pub auto_converge: bool,
    pub migration_connections: u8,
    pub migrations_per_host: u16,
    /// Begin a new epoch of machines' generations.
    pub restored: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("reading {path}")]
    Read {
        path: String,
        source: std::io::Error,
    },
    #[error("{path}: {source}")]
    Parse {
        path: String,
        source: serde_yaml_ng::Error,
    },
    #[error("--public-url {0}")]
    PublicUrl(String),
    #[error("--listen {0}: give it as ADDRESS:PORT")]
    Listen(String),
    #[error(
        "--plain-http on {0} would send passwords in the clear: listen on a loopback address, leave \
         the flag out, or say --behind-proxy if a proxy in front speaks TLS"
    )]
    PlainHttp(String),
    #[error("--agents-listen {0}: give it as ADDRESS:PORT")]
    AgentsListen(String),
    #[error("--agents-url {0}")]
    AgentsUrl(String),
    #[error("--name {0}: letters, digits and - only")]
    Name(String),
    #[error("tls-certificate and tls-key go together: {0} is missing")]
    HalfTls(&'static str),
    #[error("migration-connections {0}: 1 to {MOST_LANES}")]
    MigrationConnections(u8),
    #[error("migrations-per-host 0: 1 at least")]
    MigrationsPerHost,
}

impl Config {
    pub fn resolve(options: Options) -> Result<Self, ConfigError> {
        let file = options
            .config
            .as_deref()
            .map(read)
            .transpose()?
            .unwrap_or_default();
        let options = options.or(file);
        let state_dir = options
            .state_dir
            .unwrap_or_else(|| "/var/lib/fractus".into());
        let listen = options
            .listen
            .unwrap_or_else(|| "127.0.0.1:8443".to_owned());
        let address: SocketAddr = listen
            .parse()
            .map_err(|_| ConfigError::Listen(listen.clone()))?;
        if options.plain_http && !address.ip().is_loopback() && !options.behind_proxy {
            return Err(ConfigError::PlainHttp(listen));
        }
        let tls = match (options.plain_http, options.tls_certificate, options.tls_key) {
            (true, ..) => None,
            (false, Some(certificate), Some(key)) => Some(TlsSource::Given { certificate, key }),
            (false, None, None) => Some(TlsSource::Own),
            (false, Some(_), None) => return Err(ConfigError::HalfTls("tls-key")),
            (false, None, Some(_)) => return Err(ConfigError::HalfTls("tls-certificate")),
        };
        let public_url = options.public_url.unwrap_or_else(|| {
            let scheme = if tls.is_some() { "https" } else { "http" };
            format!("{scheme}://{}:{}", reachable(address.ip()), address.port())
        });
        let database = options.database.unwrap_or_else(|| {
            format!(
                "sqlite://{}",
                absolute(&state_dir).join("fractus.sqlite").display()
            )
        });
        let agents_listen = options
            .agents_listen
            .unwrap_or_else(|| "0.0.0.0:8444".to_owned());
        let agents_listen: SocketAddr = agents_listen
            .parse()
            .map_err(|_| ConfigError::AgentsListen(agents_listen.clone()))?;
        let agents_url = options.agents_url.unwrap_or_else(|| {
            format!(
                "https://{}:{}",
                reachable(agents_listen.ip()),
                agents_listen.port()
            )
        });
        let agents_url = PublicUrl::parse(&agents_url).map_err(ConfigError::AgentsUrl)?;
        let name = options.name.unwrap_or_else(|| plain(&hostname()));
        if name != plain(&name) || name.is_empty() {
            return Err(ConfigError::Name(name));
        }
        let usual = Limits::default();
        let image_limits = Limits {
            image: options.image_size_limit.map_or(usual.image, |size| size.0),
            project: options.image_project_limit.map(|size| size.0),
            reserve: options.image_reserve.map_or(usual.reserve, |size| size.0),
            ..usual
        };
        let migration_connections = options.migration_connections.unwrap_or(1);
        if !(1..=MOST_LANES).contains(&migration_connections) {
            return Err(ConfigError::MigrationConnections(migration_connections));
        }
        let migrations_per_host = options.migrations_per_host.unwrap_or(MIGRATIONS_PER_HOST);
        if migrations_per_host == 0 {
            return Err(ConfigError::MigrationsPerHost);
        }
        let metrics_listen = options
            .metrics_listen
            .unwrap_or_else(|| "127.0.0.1:9464".to_owned());
        Ok(Self {
            state_dir,
            listen,
            public_url: PublicUrl::parse(&public_url).map_err(ConfigError::PublicUrl)?,
            database,
            tls,
            metrics_listen: Some(metrics_listen).filter(|address| !address.is_empty()),
            agents_listen,
            agents_url: agents_url.as_str().to_owned(),
            name,
            image_limits,
            resize_confirm_window: options
                .resize_confirm_window
                .filter(|seconds| *seconds > 0)
                .map(|seconds| Duration::from_secs(seconds.into())),
            cpu_mode: options.cpu_profile.unwrap_or_default(),
            post_copy: options.post_copy,
            auto_converge: options.auto_converge.unwrap_or(true),
            migration_connections,
            migrations_per_host,
            restored: options.restored,
        })
    }

    /// Names and addresses that the certificate of the agents listener is for.
    pub fn agents_addresses(&self) -> Vec<String> {
        let uri: Option<http::Uri> = self.agents_url.parse().ok();
        let host = uri
            .as_ref()
            .and_then(http::Uri::host)
            .map(|host| host.trim_matches(['[', ']']));
        let mut names: Vec<String> = host.into_iter().map(str::to_owned).collect();
        for name in ["localhost", "127.0.0.1", "::1"] {
            if names.iter().all(|known| known != name) {
                names.push(name.to_owned());
            }
        }
        let own = self.agents_listen.ip();
        if !own.is_unspecified() && names.iter().all(|known| *known != own.to_string()) {
            names.push(own.to_string());
        }
        names
    }
}

impl Options {
    /// These, and `file`'s where they say nothing.
    fn or(self, file: Self) -> Self {
        Self {
            config: self.config,
            state_dir: self.state_dir.or(file.state_dir),
            listen: self.listen.or(file.listen),
            public_url: self.public_url.or(file.public_url),
            database: self.database.or(file.database),
            tls_certificate: self.tls_certificate.or(file.tls_certificate),
            tls_key: self.tls_key.or(file.tls_key),
            plain_http: self.plain_http || file.plain_http,
            behind_proxy: self.behind_proxy || file.behind_proxy,
            metrics_listen: self.metrics_listen.or(file.metrics_listen),
            image_size_limit: self.image_size_limit.or(file.image_size_limit),
            image_project_limit: self.image_project_limit.or(file.image_project_limit),
            image_reserve: self.image_reserve.or(file.image_reserve),
            resize_confirm_window: self.resize_confirm_window.or(file.resize_confirm_window),
            agents_listen: self.agents_listen.or(file.agents_listen),
            agents_url: self.agents_url.or(file.agents_url),
            name: self.name.or(file.name),
            cpu_profile: self.cpu_profile.or(file.cpu_profile),
            post_copy: self.post_copy || file.post_copy,
            auto_converge: self.auto_converge.or(file.auto_converge),
            migration_connections: self.migration_connections.or(file.migration_connections),
            migrations_per_host: self.migrations_per_host.or(file.migrations_per_host),
            restored: self.restored,
        }
    }
}

fn read(path: &Path) -> Result<Options, ConfigError> {
    let shown = || path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: shown(),
        source,
    })?;
    serde_yaml_ng::from_str(&text).map_err(|source| ConfigError::Parse {
        path: shown(),
        source,
    })
}

fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() {
        "localhost".to_owned()
    } else {
        name.to_owned()
    }
}

/// What of a name is letters, digits and `-`.
fn plain(name: &str) -> String {
    name.chars()
        .filter(|c| c.is_ascii_alphanumeric() || *c == '-')
        .collect()
}

/// A name for the address that a client on this host can use.
fn reachable(address: IpAddr) -> String {
    if address.is_unspecified() {
        return hostname();
    }
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_is_for_loopback_or_behind_a_proxy() {
        let options = |listen: &str, behind_proxy| Options {
            listen: Some(listen.to_owned()),
            plain_http: true,
            behind_proxy,
            ..Options::default()
        };
        let config = Config::resolve(options("127.0.0.1:80", false)).unwrap();
        assert_eq!(
            (config.tls, config.public_url.as_str()),
            (None, "http://127.0.0.1:80")
        );
        assert!(matches!(
            Config::resolve(options("0.0.0.0:80", false)),
            Err(ConfigError::PlainHttp(_))
        ));
        assert!(Config::resolve(options("0.0.0.0:80", true)).is_ok());
    }

    #[test]
    fn a_flag_wins_over_the_file_and_unknown_names_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fractus.yaml");
        std::fs::write(
            &path,
            "listen: 127.0.0.1:1\npublic-url: https://cloud.example\n",
        )
        .unwrap();
        let flags = |listen: Option<&str>| Options {
            config: Some(path.clone()),
            listen: listen.map(str::to_owned),
            ..Options::default()
        };
        assert_eq!(Config::resolve(flags(None)).unwrap().listen, "127.0.0.1:1");
        let config = Config::resolve(flags(Some("127.0.0.1:2"))).unwrap();
        assert_eq!(config.listen, "127.0.0.1:2");
        assert_eq!(config.public_url.as_str(), "https://cloud.example");
        let limits = "image-size-limit: 4096\nimage-project-limit: 2GiB\n";
        std::fs::write(&path, limits).unwrap();
        let limits = Config::resolve(flags(None)).unwrap().image_limits;
        let expected = Limits {
            image: 4096,
            project: Some(2 << 30),
            ..Limits::default()
        };
        assert_eq!(limits, expected);
        // Guests are slowed down unless somebody says otherwise.
        let slows = |flag| {
            let options = Options {
                auto_converge: flag,
                ..flags(None)
            };
            Config::resolve(options).unwrap().auto_converge
        };
        assert!(slows(None));
        std::fs::write(&path, "auto-converge: false\n").unwrap();
        assert_eq!((slows(None), slows(Some(true))), (false, true));
        let connections = || Config::resolve(flags(None)).map(|it| it.migration_connections);
        assert_eq!(connections().unwrap(), 1);
        std::fs::write(&path, "migration-connections: 3\n").unwrap();
        assert_eq!(connections().unwrap(), 3);
        for wrong in [0, MOST_LANES + 1] {
            std::fs::write(&path, format!("migration-connections: {wrong}\n")).unwrap();
            let error = connections().unwrap_err();
            assert!(matches!(error, ConfigError::MigrationConnections(it) if it == wrong));
        }
        let at_once = || Config::resolve(flags(None)).map(|it| it.migrations_per_host);
        std::fs::write(&path, "").unwrap();
        assert_eq!(at_once().unwrap(), MIGRATIONS_PER_HOST);
        std::fs::write(&path, "migrations-per-host: 5\n").unwrap();
        assert_eq!(at_once().unwrap(), 5);
        std::fs::write(&path, "migrations-per-host: 0\n").unwrap();
        assert!(matches!(at_once(), Err(ConfigError::MigrationsPerHost)));
        // That a database was restored is true once: it has no place in a file.
        for unknown in ["lisen: x\n", "restored: true\n"] {
            std::fs::write(&path, unknown).unwrap();
            assert!(matches!(
                Config::resolve(flags(None)),
                Err(ConfigError::Parse { .. })
            ));
        }
    }
}
