//! A whole Debian, which boots from its disk image.

use std::time::Instant;

use serde_json::json;

use crate::cloud::{act, create, debian_disk, debian_image, flavor, lab, logged, settled};

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn debian_boots_from_its_disk_image() {
    let disk = debian_disk();
    let lab = lab(1).await;
    let admin = lab.controller.admin().await.unwrap();
    let image = debian_image(&admin, disk).await;
    let flavor = flavor(&admin, 2, 768, 4).await;
    let began = Instant::now();
    let server = json!({"name": "debian", "imageRef": image, "flavorRef": flavor});
    let server = create(&admin, server).await;
    logged(&admin, &server, "login:").await;
    println!("login after {:.0} s", began.elapsed().as_secs_f64());
    let log = logged(&admin, &server, "finished at").await;
    println!("{log}");
    println!("cloud-init after {:.0} s", began.elapsed().as_secs_f64());
    println!("{}", lab.hosts[0].exits().unwrap());
    assert!(!log.contains("Failed to start"), "a unit failed");
    assert!(!log.contains("emergency mode"), "emergency mode");
    assert!(log.contains("debian login:"), "it has its server's name");

    act(&admin, &server, json!({"os-stop": null})).await;
    let log = logged(&admin, &server, "reboot: Power down").await;
    assert!(log.contains("Stopped"), "an orderly shutdown: {log}");
    settled(&admin, &server, "SHUTOFF").await;
}
