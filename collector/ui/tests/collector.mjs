// Shared code of the tests: starts collectors, fills them, and opens pages in Chromium.
import { spawn } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { chromium } from "playwright-core";

function needed(name) {
  const path = process.env[name];
  if (!path) throw new Error(`${name} is not set: run collector/ui/test, which builds the programs and sets it`);
  return path;
}

async function freePort() {
  const server = createServer();
  await new Promise((resolve, reject) => server.listen(0, "127.0.0.1", resolve).on("error", reject));
  const { port } = server.address();
  await new Promise((resolve) => server.close(resolve));
  return port;
}

async function stopped(child) {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const exit = new Promise((resolve) => child.once("exit", resolve));
  child.kill("SIGTERM");
  const hard = setTimeout(() => child.kill("SIGKILL"), 10_000);
  await exit;
  clearTimeout(hard);
}

/** Starts a collector with an empty store. */
export async function startCollector() {
  const data = await mkdtemp(join(tmpdir(), "gannet-page-"));
  const [grpc, http] = [await freePort(), await freePort()];
  const child = spawn(
    needed("GANNET_COLLECTOR_BIN"),
    ["--data", data, "--grpc-listen", `127.0.0.1:${grpc}`, "--http-listen", `127.0.0.1:${http}`],
    { stdio: ["ignore", "pipe", "pipe"] },
  );
  let log = "";
  child.stdout.on("data", (text) => (log += text));
  child.stderr.on("data", (text) => (log += text));
  const address = `http://127.0.0.1:${http}/`;
  const until = Date.now() + 60_000;
  for (;;) {
    const answer = await fetch(`${address}api/v1/nodes`).catch(() => undefined);
    if (answer?.ok) break;
    if (child.exitCode !== null || Date.now() > until) {
      child.kill("SIGKILL");
      throw new Error(`the collector did not start (exit status ${child.exitCode}):\n${log}`);
    }
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  return {
    address,
    grpc: `http://127.0.0.1:${grpc}`,
    async stop() {
      await stopped(child);
      await rm(data, { recursive: true, force: true });
    },
  };
}

/** Shows a pprof file by `gannet-collector open`. */
export async function openFile(file) {
  const child = spawn(needed("GANNET_COLLECTOR_BIN"), ["open", file], { stdio: ["ignore", "pipe", "inherit"] });
  const link = await new Promise((resolve, reject) => {
    createInterface({ input: child.stdout }).on("line", resolve);
    child.once("exit", (code) => reject(new Error(`gannet-collector open ended with ${code}`)));
  });
  return { link, stop: () => stopped(child) };
}

/** Fills a collector and keeps two simulated agents connected to it. */
export async function seed(collector) {
  const child = spawn(needed("GANNET_SEED_BIN"), ["--endpoint", collector.grpc, "--stay"], { stdio: ["ignore", "pipe", "pipe"] });
  let log = "";
  child.stderr.on("data", (text) => (log += text));
  await new Promise((resolve, reject) => {
    createInterface({ input: child.stdout }).on("line", (line) => line.startsWith("two nodes") && resolve());
    child.once("exit", (code) => reject(new Error(`the seed ended with ${code}:\n${log}`)));
  });
  return { stop: () => stopped(child) };
}

export async function startBrowser() {
  return chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    headless: true,
    // The driver makes and removes a temporary profile directory.
    args: [
      "--no-sandbox",
      "--disable-gpu",
      "--disable-quic",
      "--no-first-run",
      "--disable-background-networking",
      "--disable-component-update",
      "--disable-sync",
    ],
  });
}

/** Opens a page and records its faults: errors on the console, and requests to other origins. */
export async function openPage(browser, address, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1400, height: 900 }, reducedMotion: "reduce", ...options });
  const page = await context.newPage();
  // A long timeout, for busy machines.
  page.setDefaultTimeout(60_000);
  const faults = [];
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) faults.push(`console ${message.type()}: ${message.text()}`);
  });
  page.on("pageerror", (error) => faults.push(`uncaught: ${error.stack ?? error}`));
  page.on("request", (request) => {
    if (new URL(request.url()).origin !== new URL(address).origin) faults.push(`request to ${request.url()}`);
  });
  await page.goto(address);
  return { page, faults, close: () => context.close() };
}
