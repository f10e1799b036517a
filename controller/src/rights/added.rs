//! The trials, tried: a route that someone adds is tried without a word about it here, and one that
//! lets in whom it should not is found by the trial that is there for it.

use axum::extract::Path;
use http::StatusCode;

use super::things::Things;
use super::*;
use crate::http::{Routes, Rule};

/// A cloud whose compute service has more routes. Their paths are below `made-up`, which the oracle
/// lets pass.
async fn cloud_with(add: impl FnOnce(Routes) -> Routes) -> (TestApp, Things) {
    let mut add = Some(add);
    let services = crate::serve::services()
        .into_iter()
        .map(|routes| match routes.service() {
            Service::Compute => add
                .take()
                .map_or_else(|| panic!("two of them"), |add| add(routes)),
            _ => routes,
        });
    let cloud = testing::with_services(services.collect()).await;
    let things = Things::make(&cloud).await;
    (cloud, things)
}

async fn anything() -> StatusCode {
    StatusCode::NO_CONTENT
}

#[tokio::test]
async fn an_added_route_is_tried_without_a_token_and_one_that_is_open_is_found() {
    let (cloud, things) = cloud_with(|routes| {
        routes
            .get("/v2.1/made-up/guarded", Rule::token("x"), anything)
            .get("/v2.1/made-up/open", Rule::open(), anything)
    })
    .await;
    let tried: Vec<_> = guarded(&cloud).iter().map(shown).collect();
    assert!(tried.contains(&"GET compute/v2.1/made-up/guarded".to_owned()));
    assert_eq!(
        open_without_a_reason(&cloud),
        ["GET compute/v2.1/made-up/open"]
    );
    assert!(wrong_without_a_token(&cloud, &things).await.is_empty());
}

#[tokio::test]
async fn an_added_route_that_shows_a_project_to_another_is_found() {
    async fn echo(Path(id): Path<String>) -> String {
        id
    }
    let (cloud, things) = cloud_with(|routes| {
        routes
            .get("/v2.1/made-up/servers/{id}", Rule::reader("x"), echo)
            .delete("/v2.1/made-up/servers/{id}", Rule::member("x"), anything)
    })
    .await;
    let wrong = wrong_for_another(&cloud, &things).await;
    let lines: Vec<_> = wrong
        .iter()
        .filter_map(|line| line.split(" as ").next())
        .collect();
    assert_eq!(
        lines,
        [
            "GET compute/v2.1/made-up/servers/{id}",
            "DELETE compute/v2.1/made-up/servers/{id}"
        ]
    );
}

#[tokio::test]
async fn an_added_list_that_tells_of_another_project_is_found() {
    let told = std::sync::Arc::new(std::sync::OnceLock::<String>::new());
    let tells = std::sync::Arc::clone(&told);
    let list = move || std::future::ready(tells.get().cloned().unwrap_or_default());
    let (cloud, things) =
        cloud_with(|routes| routes.get("/v2.1/made-up/all", Rule::reader("x"), list)).await;
    told.set(things.telltales().concat()).unwrap();
    assert_eq!(
        lists_that_tell(&cloud, &things, &cloud.other).await,
        ["GET compute/v2.1/made-up/all"]
    );
}

#[tokio::test]
async fn an_added_route_or_action_that_lets_a_reader_change_something_is_found() {
    let (cloud, things) = cloud_with(|routes| {
        routes
            .post("/v2.1/made-up/change", Rule::reader("x"), anything)
            // Whose handler does not look at the action's rule.
            .post("/v2.1/made-up/act", Rule::reader("x"), anything)
            .action("/v2.1/made-up/act", "dance", Rule::member("x"))
            .action("/v2.1/made-up/act", "end-all", Rule::admin("x"))
    })
    .await;
    let changed = changed_by_a_reader(&cloud, &things).await;
    assert!(
        changed.contains(&"POST compute/v2.1/made-up/change → 204 No Content".to_owned()),
        "{changed:#?}"
    );
    assert_eq!(
        wrong_for_a_low_role(&cloud, &things).await,
        [
            "POST compute/v2.1/made-up/act dance as reader → 204 No Content",
            "POST compute/v2.1/made-up/act end-all as reader → 204 No Content",
            "POST compute/v2.1/made-up/act end-all as member → 204 No Content",
            "POST compute/v2.1/made-up/act end-all as another → 204 No Content",
        ]
    );
}

#[tokio::test]
#[should_panic(expected = "nothing stands for {unheard_of}")]
async fn an_added_route_about_a_thing_that_the_trials_have_none_of_fails_them() {
    let (cloud, things) = cloud_with(|routes| {
        let path = "/v2.1/made-up/unheard-of/{unheard_of}";
        routes.get(path, Rule::reader("x"), anything)
    })
    .await;
    wrong_without_a_token(&cloud, &things).await;
}
