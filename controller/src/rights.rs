//! Every endpoint of every service, tried by those who may not.
//!
//! Goes through the table that routes are made by, so an endpoint cannot be left out: one whose
//! parameters this test has no thing for fails it. What is refused to others is then done by whom the
//! thing belongs to, which shows that it was there and the request right. Each trial answers what it
//! found wrong, so that [`added`] can show that it finds it. Owns no code of the controller.

mod added;
pub mod things;

use http::Method;

use self::things::Things;
use crate::http::{Endpoint, Service};
use crate::policy::Needs;
use crate::testing::{self, TestApp};

/// `GET compute/v2.1/servers/{id}`, with an action behind it.
pub fn shown(endpoint: &Endpoint) -> String {
    let action = endpoint
        .action
        .map_or(String::new(), |action| format!(" {action}"));
    format!(
        "{} {}{}{action}",
        endpoint.method,
        endpoint.service.prefix(),
        endpoint.path
    )
}

/// Endpoints of all services, those that need no token aside.
fn guarded(cloud: &TestApp) -> Vec<Endpoint> {
    let mut endpoints: Vec<_> = cloud
        .public
        .endpoints()
        .filter(|endpoint| endpoint.rule.needs != Needs::Nothing)
        .cloned()
        .collect();
    endpoints.sort_by_key(shown);
    endpoints
}

/// Endpoints that need no token and are not known to.
fn open_without_a_reason(cloud: &TestApp) -> Vec<String> {
    let mut open: Vec<_> = cloud
        .public
        .endpoints()
        .filter(|endpoint| endpoint.rule.needs == Needs::Nothing)
        .map(shown)
        .collect();
    open.sort();
    open.dedup();
    let known = |line: &str| {
        let versions = [
            "/",
            "/versions",
            "/v2",
            "/v2/",
            "/v2.1",
            "/v2.1/",
            "/v3",
            "/v3/",
        ];
        let path = line.split_once(' ').map_or("", |(_, path)| path);
        let (_, below) = path.split_once('/').unwrap_or(("", ""));
        versions.contains(&format!("/{below}").as_str())
            // A login; and who changes a password shows the old one.
            || line == "POST identity/v3/auth/tokens"
            || line == "POST identity/v3/users/{id}/password"
            // A console's URL carries its own secret.
            || line.contains("console")
    };
    open.retain(|line| !known(line));
    open
}

#[tokio::test]
async fn only_these_endpoints_need_no_token() {
    let open = open_without_a_reason(&testing::app().await);
    assert!(open.is_empty(), "{open:#?}");
}

#[tokio::test]
async fn without_a_token_every_endpoint_answers_401() {
    let cloud = testing::app().await;
    let things = Things::make(&cloud).await;
    let endpoints = guarded(&cloud);
    for (service, least) in [
        (Service::Identity, 50),
        (Service::Image, 15),
        (Service::Compute, 60),
        (Service::Fractus, 4),
    ] {
        let count = endpoints
            .iter()
            .filter(|endpoint| endpoint.service == service)
            .count();
        assert!(
            count >= least,
            "{count} endpoints of {service:?}: is the table whole?"
        );
    }
    let wrong = wrong_without_a_token(&cloud, &things).await;
    assert!(wrong.is_empty(), "{wrong:#?}");
}

async fn wrong_without_a_token(cloud: &TestApp, things: &Things) -> Vec<String> {
    let mut wrong = Vec::new();
    for endpoint in &guarded(cloud) {
        for token in ["", "f1.junk"] {
            let answer = things.try_as(cloud, token, endpoint).await;
            if answer.status != 401 || answer.header("www-authenticate").is_empty() {
                wrong.push(format!("{} → {}", shown(endpoint), answer.status));
            }
        }
    }
    wrong
}

#[tokio::test]
async fn a_role_that_is_too_low_is_refused_by_every_endpoint() {
    let cloud = testing::app().await;
    let things = Things::make(&cloud).await;
    let wrong = wrong_for_a_low_role(&cloud, &things).await;
    assert!(wrong.is_empty(), "{wrong:#?}");
}

async fn wrong_for_a_low_role(cloud: &TestApp, things: &Things) -> Vec<String> {
    let mut wrong = Vec::new();
    for endpoint in &guarded(cloud) {
        let callers = match endpoint.rule.needs {
            Needs::Nothing | Needs::Token | Needs::Reader => continue,
            Needs::Member => vec![("reader", &cloud.reader)],
            Needs::Manager | Needs::Admin | Needs::Service => vec![
                ("reader", &cloud.reader),
                ("member", &cloud.member),
                ("another", &cloud.other),
            ],
        };
        for (who, token) in callers {
            let answer = things.try_as(cloud, token, endpoint).await;
            if answer.status != 403 {
                wrong.push(format!("{} as {who} → {}", shown(endpoint), answer.status));
            }
        }
    }
    wrong
}

/// What with a parameter in its path belongs to the cloud and is read by all.
const OF_EVERYBODY: [&str; 8] = [
    "GET compute/v2.1/extensions/{alias}",
    "GET compute/v2.1/flavors/{id}",
    "GET compute/v2.1/flavors/{id}/os-extra_specs",
    "GET compute/v2.1/flavors/{id}/os-extra_specs/{key}",
    // As in nova: the cloud's defaults, whatever the project.
    "GET compute/v2.1/os-quota-sets/{id}/defaults",
    // Of a domain, all in it see its name.
    "GET identity/v3/domains/{id}",
    "GET identity/v3/regions/{id}",
    "GET image/v2/schemas/{name}",
];

/// Endpoints about one thing of a project that need no more than a member of it.
fn of_a_project(cloud: &TestApp) -> Vec<Endpoint> {
    let all = guarded(cloud);
    let mut own: Vec<_> = all
        .iter()
        .filter(|endpoint| {
            let by_action =
                |other: &&Endpoint| other.path == endpoint.path && other.action.is_some();
            endpoint.path.contains('{')
                && !OF_EVERYBODY.contains(&shown(endpoint).as_str())
                && matches!(
                    endpoint.rule.needs,
                    Needs::Token | Needs::Reader | Needs::Member
                )
                // Its actions are tried, each by itself.
                && (endpoint.action.is_some() || !all.iter().any(|other| by_action(&other)))
        })
        .cloned()
        .collect();
    // What ends the thing comes last; the longer path before what it is below.
    own.sort_by_key(|endpoint| {
        let ends = endpoint.method == Method::DELETE || endpoint.action == Some("forceDelete");
        (
            ends,
            std::cmp::Reverse(endpoint.path.len()),
            shown(endpoint),
        )
    });
    own
}

#[tokio::test]
async fn what_belongs_to_a_project_is_there_for_its_member_and_not_for_another() {
    let cloud = testing::app().await;
    let things = Things::make(&cloud).await;
    let endpoints = of_a_project(&cloud);
    assert!(
        endpoints.len() > 50,
        "{} endpoints: are all there?",
        endpoints.len()
    );
    let table: Vec<_> = guarded(&cloud).iter().map(shown).collect();
    let gone = OF_EVERYBODY
        .iter()
        .chain(NEVER.iter().map(|(line, ..)| line));
    for line in gone {
        assert!(
            table.iter().any(|known| known == line),
            "there is no {line}"
        );
    }
    let mut wrong = wrong_for_another(&cloud, &things).await;
    // The same requests are right for whom the things belong to: it was the caller that was refused.
    for endpoint in &endpoints {
        let answer = things.try_as(&cloud, &cloud.member, endpoint).await;
        let (line, status) = (shown(endpoint), answer.status.as_u16());
        let lets_in = match NEVER.iter().find(|(known, ..)| *known == line) {
            Some((_, as_known, text)) => status == *as_known && answer.text().contains(text),
            None => ![400, 401, 403, 404, 405, 415, 500].contains(&status),
        };
        if !lets_in {
            wrong.push(format!("{line} as its member → {status} {}", answer.text()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

async fn wrong_for_another(cloud: &TestApp, things: &Things) -> Vec<String> {
    let mut wrong = Vec::new();
    for endpoint in &of_a_project(cloud) {
        let answer = things.try_as(cloud, &cloud.other, endpoint).await;
        let refused = match endpoint.service {
            // As keystone, and as nova for quotas and usage: 403 whether it is there or not.
            Service::Identity => answer.status == 403,
            _ if endpoint.path.starts_with("/v2.1/os-quota-sets") => answer.status == 403,
            _ if endpoint.path.starts_with("/v2.1/os-simple-tenant-usage") => answer.status == 403,
            _ => answer.status == 404,
        };
        if !refused {
            wrong.push(format!(
                "{} as another → {} {}",
                shown(endpoint),
                answer.status,
                answer.text()
            ));
        }
    }
    wrong
}

/// What a member is refused of its own things, and the words which show that it was let that far.
const NEVER: [(&str, u16, &str); 4] = [
    // Whom an image is shared with says whether it takes it, not its owner.
    (
        "PUT image/v2/images/{id}/members/{member}",
        403,
        "modify_member",
    ),
    // Servers have no networks yet.
    (
        "GET compute/v2.1/servers/{id}/ips/{label}",
        404,
        "not a member of specified network",
    ),
    // Consoles are serial lines.
    (
        "POST compute/v2.1/servers/{id}/action os-getSPICEConsole",
        400,
        "Unavailable console type",
    ),
    (
        "POST compute/v2.1/servers/{id}/action os-getVNCConsole",
        400,
        "Unavailable console type",
    ),
];

#[tokio::test]
async fn no_list_tells_another_project_of_them() {
    let cloud = testing::app().await;
    let things = Things::make(&cloud).await;
    let wrong = lists_that_tell(&cloud, &things, &cloud.other).await;
    let told = lists_that_tell(&cloud, &things, &cloud.member).await;
    assert!(wrong.is_empty(), "{wrong:#?}");
    // Who they belong to does see them there.
    for list in [
        "compute/v2.1/os-keypairs",
        "compute/v2.1/servers",
        "compute/v2.1/servers/detail",
        "identity/v3/auth/projects",
        "image/v2/images",
    ] {
        assert!(told.contains(&format!("GET {list}")), "{list}: {told:#?}");
    }
}

/// Lists that show the caller something of the project `one`.
async fn lists_that_tell(cloud: &TestApp, things: &Things, caller: &str) -> Vec<String> {
    let theirs = things.telltales();
    let mut tell = Vec::new();
    for endpoint in &guarded(cloud) {
        if endpoint.method != Method::GET || endpoint.path.contains('{') {
            continue;
        }
        let text = things.try_as(cloud, caller, endpoint).await.text();
        if theirs.iter().any(|theirs| text.contains(theirs)) {
            tell.push(shown(endpoint));
        }
    }
    tell
}

#[tokio::test]
async fn a_reader_changes_nothing() {
    let cloud = testing::app().await;
    let things = Things::make(&cloud).await;
    let wrong = changed_by_a_reader(&cloud, &things).await;
    assert!(wrong.is_empty(), "{wrong:#?}");
}

async fn changed_by_a_reader(cloud: &TestApp, things: &Things) -> Vec<String> {
    let mut wrong = Vec::new();
    for endpoint in &guarded(cloud) {
        if matches!(endpoint.method, Method::GET | Method::HEAD) {
            continue;
        }
        // Its own token a reader may end.
        if endpoint.path == "/v3/auth/tokens" {
            continue;
        }
        let answer = things.try_as(cloud, &cloud.reader, endpoint).await;
        if answer.status.is_success() {
            wrong.push(format!("{} → {}", shown(endpoint), answer.status));
        }
    }
    wrong
}
