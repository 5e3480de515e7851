import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { after, before, describe, it } from "node:test";
import { gunzipSync } from "node:zlib";
import { openPage, startCollector } from "./collector.mjs";
import { CHECKOUT, accessible, drawn, framesOf, hueOf, named, withPage } from "./page.mjs";

const { on, tested } = withPage();

let empty;

before(async () => {
  empty = await startCollector();
});

after(() => empty?.stop());

describe("the flame graph", () => {
  it("draws functions with widths in proportion to their shares", async () => {
    await on(`?${CHECKOUT}`, async (page) => {
      const frames = await drawn(page, "shop::checkout::price_basket");
      for (const name of ["main", "shop::checkout::place_order", "SSL_write"]) named(frames, name);
      named(frames, "[truncated]");
      named(frames, "__libc_write");
      // Computed in the page, because the driver cannot return objects as deep as these stacks.
      const share = await page.evaluate(async () => {
        const until = Date.now();
        const query = encodeURIComponent('{service_name="checkout"}');
        const answer = await fetch(`./api/v1/flamegraph?query=${query}&from=${until - 3600e3}&until=${until}&type=cpu/nanoseconds`);
        const { root, total } = await answer.json();
        const find = (node) => (node.name === "shop::checkout::price_basket" ? node : (node.children ?? []).map(find).find(Boolean));
        return find(root).total / total;
      });
      assert.ok(share > 0.2 && share < 0.8, `${share}`);
      const [all, basket] = [named(frames, "all"), named(frames, "shop::checkout::price_basket")];
      assert.ok(Math.abs(basket.width / all.width - share) < 0.01, `drawn ${basket.width / all.width}, is ${share}`);
    });
  });

  it("distinguishes kernel, inlined and user frames", async () => {
    await on(`?${CHECKOUT}&colour=kind`, async (page) => {
      const frames = await drawn(page, "shop::checkout::price_basket");
      const kernel = named(frames, "tcp_sendmsg");
      const inlined = named(frames, "shop::checkout::apply_discount");
      const user = named(frames, "shop::checkout::price_basket");
      assert.ok(kernel.classes.includes("kernel"));
      assert.ok(inlined.classes.includes("inlined"));
      assert.ok(named(frames, "[truncated]").classes.includes("special"));
      assert.equal(new Set([kernel, inlined, user].map(({ fill }) => hueOf(fill))).size, 3);
      const legend = await page.textContent(".legend");
      for (const word of ["native", "kernel", "native, inlined", "not a function"]) assert.ok(legend.includes(word), legend);
    });
  });

  it("marks frames that rest on a guess", async () => {
    await on(`?${CHECKOUT}`, async (page) => {
      const frames = await drawn(page, "shop::template::escape");
      const classes = (name) => named(frames, name).classes.filter((name) => name.includes("guessed")).join(" ");
      assert.equal(classes("shop::template::escape"), "");
      assert.equal(classes("shop::template::call"), "guessed");
      assert.equal(classes("shop::template::render"), "guessed");
      assert.equal(classes("shop::checkout::place_order"), "partly-guessed");
      assert.equal(classes("shop::checkout::price_basket"), "");
      assert.equal(classes("all"), "");
      const fill = (name) =>
        page.$$eval("g.frame", (groups, name) => getComputedStyle(groups.find((group) => group.__data__.data.name === name).querySelector("rect")).fill, name);
      assert.match(await fill("shop::template::call"), /^url\("?#hatch-\d+"?\)/);
      assert.match(await fill("shop::template::escape"), /^oklch/);
      assert.match(await page.textContent(".legend"), /guessed: found by frame pointer, without an unwind table in [\d.]+% of the samples/);
      // Keys reach the facts, and a screen reader hears them.
      await page.focus(".flame-graph");
      await page.keyboard.press("/");
      await page.keyboard.type("template::call");
      await page.keyboard.press("Enter");
      await page.waitForFunction(() => document.querySelectorAll("g.frame.match").length > 0);
      await page.focus(".flame-graph");
      await page.keyboard.press("n");
      await page.waitForFunction(() => document.querySelector("#picked-frame")?.textContent.includes("shop::template::call"));
      assert.match(await page.textContent("#picked-frame"), /guessed: it or a function that it called was found by frame pointer/);
      assert.match(await page.textContent(".flame [role=status].visually-hidden"), /shop::template::call, .*, guessed$/);
      // A match keeps its mark.
      assert.match(await fill("shop::template::call"), /^url/);
      await accessible(page);
    });
  });

  it("hides error frames on demand and keeps their values", async () => {
    await on(`?${CHECKOUT}`, async (page) => {
      const shown = await drawn(page, "shop::checkout::price_basket");
      assert.ok(shown.some(({ name }) => name === "[truncated]"));
      await page.getByRole("button", { name: "Options of the graph" }).click();
      await page.getByText("Hide error frames").click();
      await page.waitForFunction(() => ![...document.querySelectorAll("g.frame")].some((group) => group.__data__.data.name === "[truncated]"));
      assert.match(page.url(), /hide_errors=1/);
      const hidden = await framesOf(page);
      assert.ok(hidden.some(({ name }) => name === "shop::report::render"));
      assert.ok(Math.abs(named(hidden, "all").width - named(shown, "all").width) < 1);
    });
  });

  it("shows how much the collector read, and from where", async () => {
    await on(`?${CHECKOUT}`, async (page) => {
      await drawn(page, "shop::checkout::price_basket");
      const note = page.getByRole("button", { name: /^What the collector read:/ });
      assert.match(await note.textContent(), /^(\d[\d.]* \wi?B read|from memory) in /);
      await note.focus();
      await page.keyboard.press("Enter");
      const box = page.getByRole("dialog", { name: /^What the collector read/ });
      const rows = await box.locator("tbody tr").evaluateAll((rows) => rows.map((row) => [...row.cells].map((cell) => cell.textContent)));
      assert.equal(rows[0][0], "Stored profiles, one by one");
      // The same number of profiles as beside the total.
      const [, profiles] = /· ([\d,]+) profile/.exec(await page.textContent(".numbers"));
      assert.equal(rows[0][1], profiles);
      await accessible(page);
      await page.keyboard.press("Escape");
      await box.waitFor({ state: "detached" });
    });
  });

  it("draws a stack of sixty frames", async () => {
    await on(`?${CHECKOUT}`, async (page) => {
      await drawn(page, "shop::checkout::price_basket");
      const depth = await page.$$eval("g.frame", (groups) => Math.max(...groups.map((group) => group.__data__.depth)));
      assert.ok(depth >= 58, `${depth}`);
    });
  });

  it("highlights matches and counts their share once", async () => {
    await on(`?${CHECKOUT}`, async (page) => {
      await drawn(page, "shop::checkout::price_basket");
      await page.keyboard.press("/");
      await page.keyboard.type("PARSE_value");
      await page.waitForFunction(() => document.querySelectorAll("g.frame.match").length > 0);
      const frames = await framesOf(page);
      const matches = frames.filter(({ classes }) => classes.includes("match"));
      assert.ok(matches.every(({ name }) => name.includes("parse_value")));
      assert.equal(new Set(matches.map(({ fill }) => fill)).size, 1);
      assert.notEqual(matches[0].fill, named(frames, "main").fill);
      const said = await page.textContent(".found");
      // 52 nested frames of 33 samples in about 580. A sum over all frames would exceed 100 %.
      assert.match(said, /52 frames · [4-7]\.\d% matched/);
      await page.keyboard.press("Escape");
      await page.waitForFunction(() => document.querySelectorAll("g.frame.match").length === 0);
    });
  });

  it("explains a wrong search pattern", async () => {
    await on(`?${CHECKOUT}&search=${encodeURIComponent("/(/")}`, async (page) => {
      await drawn(page, "main");
      assert.match(await page.textContent(".found"), /parenthes|group/i);
      await page.getByRole("button", { name: "Table", exact: true }).click();
      await page.locator(".table-box .bad", { hasText: /group/ }).waitFor();
    });
  });

  it("moves, zooms and resets by keys, with the zoom in the address", async () => {
    await on(`?${CHECKOUT}`, async (page) => {
      await drawn(page, "shop::checkout::price_basket");
      await page.focus(".flame-graph");
      const current = () => page.$eval("g.frame.current", (group) => group.__data__.data.name);
      await page.keyboard.press("ArrowDown");
      assert.equal(await current(), "all");
      const walk = ["_start", "__libc_start_main_impl", "main", "shop::server::serve", "shop::server::handle", "shop::checkout::place_order"];
      for (const name of walk) {
        await page.keyboard.press("ArrowDown");
        assert.equal(await current(), name);
      }
      await page.keyboard.press("ArrowRight");
      assert.equal(await current(), "__libc_write");
      await page.keyboard.press("ArrowLeft");
      await page.keyboard.press("Enter");
      const width = (name) => framesOf(page).then((frames) => named(frames, name).width);
      await page.waitForFunction(() => location.search.includes("zoom="));
      const whole = await width("all");
      assert.ok(Math.abs((await width("shop::checkout::place_order")) - whole) < 1.5);
      assert.match(await page.textContent(".crumbs"), /place_order/);
      assert.match(await page.textContent(".picked"), /shop::checkout::place_order/);
      await page.reload();
      await drawn(page, "shop::checkout::price_basket");
      await page.waitForFunction(() => document.querySelector(".crumbs")?.textContent.includes("place_order"));
      assert.ok(Math.abs((await width("shop::checkout::place_order")) - whole) < 1.5);
      await page.focus(".flame-graph");
      await page.keyboard.press("Escape");
      await page.waitForFunction(() => !location.search.includes("zoom="));
      assert.ok((await width("shop::checkout::place_order")) < whole - 20);
    });
  });

  it("keeps the zoomed frame across a refresh and in another range", async () => {
    await on(`?${CHECKOUT}`, async (page) => {
      await drawn(page, "shop::checkout::price_basket");
      await page.locator("g.frame").filter({ hasText: /^shop::checkout::place_order$/ }).click();
      await page.waitForFunction(() => location.search.includes("zoom="));
      const [answer] = await Promise.all([
        page.waitForResponse((response) => response.url().includes("flamegraph")),
        page.getByRole("button", { name: "Refresh now" }).click(),
      ]);
      assert.equal(answer.status(), 200);
      await page.waitForFunction(() => !document.querySelector(".spinner"));
      const frames = await drawn(page, "shop::checkout::price_basket");
      assert.ok(Math.abs(named(frames, "shop::checkout::place_order").width - named(frames, "all").width) < 1.5);
      assert.match(await page.textContent(".crumbs [aria-current]"), /place_order/);
      const before = await page.textContent(".numbers .big");
      await page.focus(".plot");
      for (let step = 0; step < 8; step += 1) await page.keyboard.press("Shift+ArrowLeft");
      // Between two answers there may be no number.
      await page.waitForFunction((former) => ![undefined, former].includes(document.querySelector(".numbers .big")?.textContent) && !document.querySelector(".spinner"), before);
      assert.match(await page.textContent(".crumbs [aria-current]"), /place_order/);
    });
  });

  it("zooms by a click and shows values in a tooltip", async () => {
    await on(`?${CHECKOUT}`, async (page) => {
      await drawn(page, "shop::checkout::price_basket");
      const frame = page.locator("g.frame").filter({ hasText: /^shop::checkout::price_basket$/ });
      await frame.hover();
      assert.match(await page.textContent(".tip.on"), /price_basket.*checkout.*total\d.*\d (s|min).*%self/s);
      await frame.click();
      await page.waitForFunction(() => document.querySelector(".crumbs [aria-current]")?.textContent === "shop::checkout::price_basket");
      await page.getByRole("button", { name: "Reset zoom" }).click();
      await page.waitForFunction(() => document.querySelector(".crumbs [aria-current]")?.textContent === "all");
    });
  });
});

describe("comparison", () => {
  it("of two ranges shows more in orange and less in blue", async () => {
    await on(`?${CHECKOUT}&compare=1`, async (page) => {
      const frames = await drawn(page, "shop::checkout::price_basket");
      const [less, more] = [named(frames, "shop::checkout::price_basket"), named(frames, "shop::checkout::pay")];
      assert.ok(less.classes.includes("less") && more.classes.includes("more"));
      assert.equal(hueOf(less.fill), 250);
      assert.equal(hueOf(more.fill), 60);
      // What the browser made of it, channel by channel.
      const rgb = (fill) =>
        page.evaluate((colour) => {
          const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
          context.fillStyle = colour;
          context.fillRect(0, 0, 1, 1);
          return [...context.getImageData(0, 0, 1, 1).data];
        }, fill);
      const [blue, orange] = [await rgb(less.fill), await rgb(more.fill)];
      assert.ok(blue[2] > blue[0] + 20, `blue ${blue}`);
      assert.ok(orange[0] > orange[2] + 20, `orange ${orange}`);
      assert.match(await page.textContent(".legend"), /less than the base.*more than the base/s);
      await page.getByRole("button", { name: "Options of the graph" }).click();
      await page.getByText("Red and green differences").click();
      await page.waitForFunction(() => location.search.includes("red_green"));
      const others = await framesOf(page);
      assert.equal(hueOf(named(others, "shop::checkout::price_basket").fill), 150);
      assert.equal(hueOf(named(others, "shop::checkout::pay").fill), 25);
    });
  });

  it("of two series shows functions of only one of them", async () => {
    await on(`?${CHECKOUT}&compare=1&base=${encodeURIComponent('{service_name="search"}')}`, async (page) => {
      const frames = await drawn(page, "shop::search::rank");
      assert.ok(named(frames, "shop::search::rank").classes.includes("less"));
      assert.ok(named(frames, "shop::checkout::place_order").classes.includes("more"));
    });
  });

  it("has a change for every function in the table", async () => {
    await on(`?${CHECKOUT}&compare=1&show=table`, async (page) => {
      const row = page.locator("table.top tbody tr", { hasText: "shop::checkout::apply_discount" });
      assert.match(await row.locator(".change").textContent(), /^−\d+\.\d pp$/);
      assert.equal(await page.getByRole("columnheader", { name: "Change" }).getAttribute("aria-sort"), "descending");
    });
  });
});

describe("the table", () => {
  it("has columns of the base once the answer has their values", async () => {
    await on(`?${CHECKOUT}&show=both`, async (page) => {
      await page.waitForSelector("table.top tbody tr");
      let release;
      const held = new Promise((resolve) => (release = resolve));
      await page.route(/\/top\?.*base_query/, async (route) => {
        await held;
        await route.continue();
      });
      await page.getByRole("button", { name: "Compare", exact: true }).click();
      await page.waitForSelector(".flame.diff g.frame.less");
      assert.equal(await page.getByRole("columnheader", { name: "Base total" }).count(), 0);
      release();
      await page.getByRole("columnheader", { name: "Base total" }).waitFor();
      await page.locator("table.top td.change.less").first().waitFor();
    });
  });

  it("sorts by each column and shows a function in the graph", async () => {
    await on(`?${CHECKOUT}&show=both`, async (page) => {
      const names = () => page.$$eval("table.top tbody th button", (buttons) => buttons.map((button) => button.textContent));
      const values = (column) =>
        page.$$eval(`table.top tbody tr td:nth-child(${column}) .share`, (cells) => cells.map((cell) => Number.parseFloat(cell.textContent.replace("<", ""))));
      await page.waitForSelector("table.top tbody tr");
      const descending = (list) => list.every((value, at) => at === 0 || value <= list[at - 1]);
      assert.ok(descending(await values(3)), "by self");
      await page.getByRole("button", { name: "Total", exact: true }).click();
      assert.ok(descending(await values(4)), "by total");
      assert.equal((await values(4))[0] > 90, true);
      await page.getByRole("button", { name: "Total", exact: true }).click();
      assert.ok(descending((await values(4)).reverse()), "by total, upwards");
      await page.getByRole("button", { name: "Function", exact: true }).click();
      const sorted = await names();
      assert.deepEqual(sorted, [...sorted].sort((a, b) => a.localeCompare(b)));
      await page.getByRole("button", { name: "shop::checkout::pay", exact: true }).click();
      await page.waitForFunction(() => document.querySelectorAll("g.frame.match").length === 1);
      assert.equal(await page.inputValue('input[type="search"]'), '"shop::checkout::pay"');
    });
  });
});

describe("choosing", () => {
  it("a service from the list changes the graph and the address", async () => {
    await on("", async (page) => {
      await drawn(page, "main");
      await page.getByRole("combobox", { name: "Service" }).click();
      await page.getByRole("option", { name: "search" }).click();
      const frames = await drawn(page, "shop::search::rank");
      await page.waitForFunction(() => ![...document.querySelectorAll("g.frame")].some((group) => group.__data__.data.name.includes("checkout")));
      assert.ok(frames.length > 5);
      assert.equal(await page.inputValue(".selector input"), '{service_name="search"}');
      await page.goBack();
      await drawn(page, "shop::checkout::price_basket");
    });
  });

  it("a label and its value by keys alone", async () => {
    await on("", async (page) => {
      await drawn(page, "main");
      await page.getByRole("button", { name: "Add a filter by label" }).focus();
      await page.keyboard.press("Enter");
      await page.keyboard.type("n");
      await page.getByRole("option", { name: "node", exact: true }).waitFor();
      const names = await page.getByRole("dialog").getByRole("option").allTextContents();
      assert.ok(names.indexOf("node") > 0, `${names}`);
      for (let step = 0; step <= names.indexOf("node"); step += 1) await page.keyboard.press("ArrowDown");
      await page.keyboard.press("Enter");
      await page.getByRole("dialog").getByRole("combobox", { name: "Value" }).focus();
      await page.keyboard.press("ArrowDown");
      await page.getByRole("option", { name: "node-b" }).waitFor();
      await page.keyboard.type("node-b");
      await page.keyboard.press("Enter");
      await page.waitForFunction(() => document.querySelector(".selector input")?.value === '{node="node-b"}');
      await page.waitForFunction(() => ![...document.querySelectorAll("g.frame")].some((group) => group.__data__.data.name.includes("checkout")));
    });
  });

  it("a range on the timeline, by dragging and by keys", async () => {
    await on(`?${CHECKOUT}`, async (page) => {
      await drawn(page, "main");
      const before = await page.textContent(".numbers .big");
      const box = await page.locator(".plot").boundingBox();
      await page.mouse.move(box.x + box.width * 0.6, box.y + 30);
      await page.mouse.down();
      await page.mouse.move(box.x + box.width * 0.8, box.y + 30, { steps: 5 });
      await page.mouse.up();
      await page.waitForFunction((former) => ![undefined, former].includes(document.querySelector(".numbers .big")?.textContent), before);
      assert.match(new URL(page.url()).search, /span=\d+-\d+/);
      await page.focus(".plot");
      await page.keyboard.press("Escape");
      await page.waitForFunction((former) => document.querySelector(".numbers .big")?.textContent === former, before);
      await page.keyboard.press("ArrowLeft");
      assert.match(await page.getAttribute(".plot", "aria-valuetext"), /^\d\d:\d\d:\d\d: .+ profiles?$/);
      for (let step = 0; step < 5; step += 1) await page.keyboard.press("Shift+ArrowLeft");
      await page.waitForFunction(() => location.search.includes("span="));
    });
  });

  it("another type of value", async () => {
    await on(`?q=${encodeURIComponent('{service_name="checkout"}')}`, async (page) => {
      await drawn(page, "shop::checkout::price_basket");
      await page.locator("select").selectOption({ label: "Off-CPU time" });
      await drawn(page, "shop::db::query");
      assert.match(await page.textContent(".numbers"), /Off-CPU time/);
    });
  });

  /** Selectors with every kind of quote and with `{ } , " ' \t` in values, and the conditions after another service. */
  const EDITED = [
    [String.raw`{cgroup!='/a{b},c"d\\e', service_name='checkout'}`, String.raw`{cgroup!="/a{b},c\"d\\e",service_name="search"}`],
    ["{node=~`node-[ab]{1,2}\\b.*|x`, pod!=\"a\\tb'\",}", String.raw`{node=~"node-[ab]{1,2}\\b.*|x",pod!="a\tb'",service_name="search"}`],
    [' { pod != "}" , service_name = `checkout` } ', '{pod!="}",service_name="search"}'],
  ];
  it("another service keeps every other condition", async () => {
    for (const [before, after] of EDITED) {
      await on(`?q=${encodeURIComponent(before)}`, async (page) => {
        await page.getByRole("combobox", { name: "Service" }).click();
        await page.getByRole("option", { name: "search" }).click();
        await page.waitForFunction((wanted) => document.querySelector(".selector input")?.value === wanted, after, { timeout: 10_000 });
      });
    }
  });

  it("a selector that the page cannot read stays as it is", async () => {
    const text = String.raw`{pod="a\d",service_name="checkout"}`;
    await on(`?q=${encodeURIComponent(text)}`, async (page, faults) => {
      await page.getByRole("combobox", { name: "Service" }).click();
      await page.getByRole("option", { name: "search" }).click();
      await page.getByText("only its text field can change").waitFor();
      assert.equal(await page.inputValue(".selector input"), text);
      faults.splice(0, faults.length, ...faults.filter((fault) => !/status of 400/.test(fault)));
    });
  });

  it("a wrong selector shows an error beside the field", async () => {
    await on(`?${CHECKOUT}`, async (page, faults) => {
      await drawn(page, "main");
      await page.fill(".selector input", "{service_name=}");
      await page.keyboard.press("Enter");
      const error = page.locator(".selector [role=alert]");
      await error.waitFor();
      assert.ok((await error.textContent()).length > 15);
      assert.equal(await page.getAttribute(".selector input", "aria-invalid"), "true");
      await page.getByText("Correct the selector to see profiles").waitFor();
      await page.waitForFunction(() => !document.querySelector("[aria-busy=true]"));
      assert.equal(await page.locator(".problem").count(), 0);
      await page.fill(".selector input", '{service_name="search"}');
      await page.keyboard.press("Enter");
      await drawn(page, "shop::search::rank");
      // The browser logs the status 400 on its console. Nothing else may be there.
      const others = faults.filter((fault) => !/status of 400/.test(fault));
      faults.length = 0;
      faults.push(...others);
    });
  });

  it("a wrong time range shows an error", async () => {
    await on("?from=yesterday", async (page) => {
      await page.getByText("Invalid time range").waitFor();
    });
  });

  it("a range without profiles leads to one with profiles", async () => {
    await on(`?${CHECKOUT}&from=1700000000000&until=1700003600000`, async (page) => {
      await page.getByText("No profiles in this selection").waitFor();
      await page.getByRole("button", { name: "Go to the newest" }).click();
      await drawn(page, "shop::checkout::price_basket");
    });
  });
});

describe("downloads", () => {
  const pprof = async (page, click) => {
    const [download] = await Promise.all([page.waitForEvent("download"), click()]);
    assert.match(download.suggestedFilename(), /\.pb\.gz$/);
    const bytes = await readFile(await download.path());
    assert.deepEqual([...bytes.subarray(0, 2)], [0x1f, 0x8b]);
    return gunzipSync(bytes).toString("latin1");
  };

  it("the merged selection is gzip pprof with its functions", async () => {
    await on(`?${CHECKOUT}`, async (page) => {
      await drawn(page, "main");
      const text = await pprof(page, () => page.getByRole("link", { name: "Download pprof" }).click());
      assert.ok(text.includes("shop::checkout::price_basket") && !text.includes("shop::search::rank"));
    });
  });

  it("each stored profile has a download and can be shown alone", async () => {
    await on(`?${CHECKOUT}&show=list`, async (page) => {
      await page.waitForSelector("table.list tbody tr");
      assert.ok((await page.locator("table.list tbody tr").count()) >= 90);
      assert.match(await page.textContent("table.list tbody tr"), /checkout.*node-a.*rule.*shop/s);
      const text = await pprof(page, () => page.getByRole("link", { name: /^Download profile/ }).first().click());
      assert.ok(text.includes("shop::"));
      // A profile of another kind than the graph showed before.
      const blocked = page.locator("table.list tbody tr", { hasText: "Off-CPU" }).first();
      await blocked.getByRole("button", { name: /^Show only profile/ }).click();
      await drawn(page, "shop::db::query");
      assert.match(await page.textContent(".numbers"), /1 profile.*only profile/s);
    });
  });
});

describe("the fleet", () => {
  it("lists the nodes with their ledger, rules and rollout", async () => {
    await on("nodes", async (page) => {
      await page.getByRole("button", { name: "node-a" }).waitFor();
      assert.match(await page.textContent(".summary"), /2 of 2/);
      const b = page.locator("tr", { hasText: "node-b" }).first();
      assert.match(await b.textContent(), /connected.*5\.10\.0-33-amd64.*x86_64 · 8 CPUs.*47 MiB.*1,230 lost.*partial/s);
      await page.getByRole("button", { name: "node-b" }).click();
      const details = page.locator(".node-details");
      assert.match(await details.textContent(), /shop.*capturing.*shop-blocked.*unsupported.*sched_switch/s);
      assert.match(await details.textContent(), /62,230 taken = 60,400 delivered \+ 600 pending \+ 1,230 lost/);
      assert.match(await details.textContent(), /kernel ring buffer full.*900.*stack could not be read.*330/s);
      await page.getByLabel("Filter the nodes").fill("node-a");
      assert.equal(await b.count(), 0);
      await page.waitForFunction(() => location.search.includes("nodes=node-a"));
      await page.goto(page.url());
      await page.getByRole("button", { name: "node-a" }).waitFor();
      assert.equal(await b.count(), 0);
    });
  });

  it("shows the rules as YAML, and the answer of each node", async () => {
    await on("rules", async (page) => {
      await page.getByRole("article", { name: "Rule shop", exact: true }).waitFor();
      const text = await page.textContent("main");
      assert.match(text, /scope shop/);
      assert.match(text, /both services of the shop/);
      assert.match(text, /comm: \[checkout, "search\*"\]/);
      assert.match(text, /match:.*comm.*capture:.*hz: 99.*lifetime:/s);
      assert.match(text, /node-b.*partial.*shop-blocked · capture\.kind.*sched_switch/s);
    });
  });
});

describe("every view", () => {
  for (const [view, path] of [["profiles", `?${CHECKOUT}&show=both`], ["comparison", `?${CHECKOUT}&compare=1`], ["sandwich", `?${CHECKOUT}&show=sandwich&function=main&hide=kernel&only=shop`], ["side by side", `?${CHECKOUT}&compare=1&sides=1&time=heat&events=1`], ["table", `?${CHECKOUT}&show=table&sort=-total`], ["list", `?${CHECKOUT}&show=list`], ["nodes", "nodes"], ["rules", "rules"]]) {
    for (const colorScheme of ["light", "dark"]) {
      it(`${view} in ${colorScheme} has no accessibility fault`, async () => {
        await on(path, async (page) => {
          await page.waitForSelector("g.frame, table.list tbody tr, table.top tbody tr, .rule");
          await page.waitForFunction(() => !document.querySelector(".spinner"));
          if (view === "nodes") await page.getByRole("button", { name: "node-b" }).click();
          await accessible(page);
        }, { colorScheme });
      });
    }
  }

  it("follows the colours of the system until the reader chooses", async () => {
    await on("", async (page) => {
      const background = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
      const dark = await background();
      const changed = (from) => page.waitForFunction((from) => getComputedStyle(document.body).backgroundColor !== from, from);
      await page.getByRole("button", { name: /^Colour scheme: auto/ }).click();
      await changed(dark);
      const light = await background();
      await page.reload();
      assert.equal(await background(), light);
      await page.getByRole("button", { name: /^Colour scheme: light/ }).click();
      await changed(light);
      assert.equal(await background(), dark);
    }, { colorScheme: "dark" });
  });

  it("fits a phone without horizontal scrolling", async () => {
    for (const path of [`?${CHECKOUT}&show=both`, `?${CHECKOUT}&show=sandwich&function=main`, `?${CHECKOUT}&compare=1&sides=1&time=heat&rows=pod&events=1`, `?${CHECKOUT}&compare=1`, "nodes", "rules"]) {
      await on(path, async (page) => {
        await page.waitForSelector("g.frame, table.list tbody tr, .rule");
        const [inner, outer] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
        assert.ok(inner <= outer, `${path}: ${inner} wide on a screen of ${outer}`);
      }, { viewport: { width: 360, height: 740 } });
    }
  });

  it("reaches every control by the tab key, with a visible focus", async () => {
    await on(`?${CHECKOUT}`, async (page) => {
      await drawn(page, "main");
      const reached = [];
      for (let step = 0; step < 40; step += 1) {
        await page.keyboard.press("Tab");
        const here = await page.evaluate(() => {
          const element = document.activeElement;
          if (!element || element === document.body) return undefined;
          const target = element.matches("[role=switch]") ? element.nextElementSibling : element;
          const style = getComputedStyle(target);
          return {
            name: element.getAttribute("aria-label") ?? element.id ?? "",
            text: element.textContent.slice(0, 40),
            classes: element.className.toString(),
            outline: style.outlineStyle !== "none" && Number.parseFloat(style.outlineWidth) >= 1,
          };
        });
        if (!here) break;
        assert.ok(here.outline, `no visible focus on ${JSON.stringify(here)}`);
        reached.push(`${here.name} ${here.text} ${here.classes}`);
      }
      const all = reached.join("\n");
      for (const part of ["Skip to", "Nodes", "Refresh now", "Add a filter", "Time range", "Compare", "plot", "Search functions", "Options of the graph", "Download pprof", "flame-graph"]) {
        assert.ok(all.includes(part), `${part} is not reached:\n${all}`);
      }
    });
  });
});

describe("an empty store", () => {
  const onEmpty = async (path, run) => {
    const opened = await openPage(tested.browser, empty.address + path);
    try {
      await run(opened.page);
      await accessible(opened.page);
      assert.deepEqual(opened.faults, []);
    } finally {
      await opened.close();
    }
  };

  it("shows a newcomer the next commands", async () => {
    await onEmpty("", async (page) => {
      await page.getByText("No profiles yet").waitFor();
      const text = await page.textContent("main");
      for (const command of ["gannet-agent run --endpoint http://127.0.0.1:4100", "rules apply -f rules.yaml", "kubectl port-forward"]) {
        assert.ok(text.includes(command), command);
      }
    });
  });

  it("has help without nodes and without rules", async () => {
    await onEmpty("nodes", (page) => page.getByText("No node has connected yet").waitFor());
    await onEmpty("rules", (page) => page.getByText("No rules yet").waitFor());
  });

  it("reports an unreachable collector", async () => {
    const gone = await startCollector();
    const opened = await openPage(tested.browser, `${gone.address}nodes`);
    try {
      await opened.page.getByText("No node has connected yet").waitFor();
      await gone.stop();
      await opened.page.getByRole("button", { name: "Refresh now" }).click();
      await opened.page.getByText("The collector does not answer").waitFor();
    } finally {
      await opened.close();
      await gone.stop();
    }
  });
});
