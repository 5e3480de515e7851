// Tests of the filters, of the colours by library, and of the help for keys.
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { CHECKOUT, accessible, drawn, framesOf, hueOf, named, withPage } from "./page.mjs";

const { on } = withPage();

/** Returns all stacks of the flame graph of the API that have a self value: names from the root, kernel flags, value. */
const stacks = (page) =>
  page.evaluate(async () => {
    const until = Date.now();
    const query = encodeURIComponent('{service_name="checkout"}');
    const answer = await fetch(`./api/v1/flamegraph?query=${query}&from=${until - 3600e3}&until=${until}&type=cpu/nanoseconds`);
    const all = [];
    const walk = (node, stack) => {
      const here = [...stack, { name: node.name, kernel: node.kernel ?? false }];
      if (node.self) all.push({ stack: here.slice(1), value: node.self });
      for (const child of node.children ?? []) walk(child, here);
    };
    walk((await answer.json()).root, []);
    return all;
  });

const sum = (list) => list.reduce((total, { value }) => total + value, 0);

/** Returns the totals of drawn frames by name; a frame below one of the same name does not count. */
const totalsOf = (page) =>
  page.$$eval("g.frame", (groups) => {
    const totals = {};
    for (const { __data__: { data, parent } } of groups) {
      let outer = parent;
      while (outer && outer.data.name !== data.name) outer = outer.parent;
      if (!outer) totals[data.name] = (totals[data.name] ?? 0) + data.total;
    }
    return totals;
  });

describe("a filter", () => {
  it("hides a kind of frames and leaves their values with their callers", async () => {
    await on(`?${CHECKOUT}`, async (page) => {
      await drawn(page, "tcp_sendmsg");
      const whole = (await totalsOf(page)).all;
      await page.keyboard.press("f");
      const all = await stacks(page);
      const kernel = (100 * sum(all.filter(({ stack }) => stack.at(-1)?.kernel))) / sum(all);
      assert.equal(await page.locator(".check", { hasText: /^kernel/ }).locator(".dim").textContent(), `${kernel.toFixed(1)}%`);
      await page.getByRole("checkbox", { name: /^kernel/ }).uncheck();
      await page.waitForFunction(() => location.search.includes("hide=kernel") && !document.querySelector("g.frame.kernel"));
      const totals = await totalsOf(page);
      assert.equal(totals.all, whole);
      const expected = all.filter(({ stack }) => stack.some(({ name }) => name === "__libc_write"));
      assert.equal(totals["__libc_write"], sum(expected));
      const self = await page.$$eval("g.frame", (groups) => groups.find(({ __data__: { data } }) => data.name === "__libc_write").__data__.data.self);
      assert.equal(self, sum(expected));
      // Threads of the kernel have no other frames, so their values stay with the root.
      assert.equal(totals["worker_thread"], undefined);
      await page.getByRole("button", { name: "Remove the filter: no kernel frames" }).click();
      await drawn(page, "tcp_sendmsg");
      await page.goBack();
      await page.waitForFunction(() => !document.querySelector("g.frame.kernel"));
    });
  });

  it("keeps only stacks that match one expression and not another", async () => {
    const [only, without] = ["price_basket|^from_slice|SSL_", "malloc$|rule_m.tches"];
    await on(`?${CHECKOUT}&only=${encodeURIComponent(only)}&without=${encodeURIComponent(without)}`, async (page) => {
      await drawn(page, "shop::checkout::price_basket");
      const has = (stack, pattern) => stack.some(({ name }) => new RegExp(pattern, "i").test(name));
      const all = await stacks(page);
      const kept = all.filter(({ stack }) => has(stack, only) && !has(stack, without));
      assert.ok(kept.length > 2 && kept.length < all.length);
      const totals = await totalsOf(page);
      assert.equal(totals.all, sum(kept));
      for (const name of ["shop::checkout::price_basket", "SSL_write", "main"]) {
        assert.equal(totals[name], sum(kept.filter(({ stack }) => stack.some((frame) => frame.name === name))), name);
      }
      assert.equal(totals["shop::checkout::rule_matches"], undefined);
      assert.match(await page.textContent(".numbers"), /[\d.]+% of [\d.]+ min/);
      await accessible(page);
    });
  });

  it("leaves the table as the collector sums it up if all stacks pass", async () => {
    await on(`?${CHECKOUT}&show=table&sort=name&only=.`, async (page) => {
      await page.waitForSelector("table.top tbody tr");
      const cells = (of) => of.map((row) => [...row.querySelectorAll("th, td")].map((cell) => cell.textContent));
      const filtered = await page.$$eval("table.top tbody tr", cells);
      assert.ok(filtered.length > 30);
      await page.getByRole("button", { name: /^Remove the filter/ }).click();
      await page.waitForFunction(() => !document.querySelector(".chip") && !document.querySelector(".spinner"));
      await page.waitForSelector("table.top tbody tr");
      assert.deepEqual(await page.$$eval("table.top tbody tr", cells), filtered);
    });
  });

  it("with a wrong expression filters nothing and names the cure", async () => {
    const wrong = [["(", /unterminated group.*Close the group with \), or write \\\( for the character/i], ["*", /nothing to repeat.*Write something before/i], ["a\\", /Write \\\\ for a backslash/]];
    for (const [text, message] of wrong) {
      await on(`?${CHECKOUT}`, async (page) => {
        const before = (await drawn(page, "main")).length;
        await page.keyboard.press("f");
        await page.getByLabel("Only stacks with").fill(text);
        await page.locator("#filter-only-error").waitFor();
        assert.match(await page.textContent("#filter-only-error"), message);
        assert.equal(await page.getAttribute("#filter-only", "aria-invalid"), "true");
        await accessible(page);
        // The filter applies after a moment, and then names its mistake beside the numbers.
        assert.match(await page.textContent(".numbers [role=alert]"), message);
        await page.waitForFunction(() => !document.querySelector(".spinner"));
        assert.equal((await framesOf(page)).length, before);
      });
    }
  });

  it("keeps what a reader types at once after the key f", async () => {
    await on(`?${CHECKOUT}`, async (page) => {
      await drawn(page, "main");
      // In one task, so that the browser paints nothing in between.
      await page.evaluate(async () => {
        dispatchEvent(new KeyboardEvent("keydown", { key: "f" }));
        for (let wait = 0; wait < 100 && !document.querySelector("#filter-only"); wait += 1) await undefined;
        const field = document.querySelector("#filter-only");
        field.value = "price_basket";
        field.dispatchEvent(new Event("input", { bubbles: true }));
      });
      await page.waitForFunction(() => location.search.includes("only=price_basket"));
      assert.equal(await page.inputValue("#filter-only"), "price_basket");
    });
  });

  it("that takes too long stops, and the page handles keys meanwhile", async () => {
    // Tries all ways to divide a name into words: for the names here, longer than a day.
    const slow = String.raw`(\w+\W*)+!`;
    const matchersEnd = (page) => Promise.all(page.workers().filter((worker) => worker.url().includes("matchWorker")).map((worker) => worker.waitForEvent("close")));
    for (const address of [`only=${encodeURIComponent(slow)}`, `search=${encodeURIComponent(`/${slow}/`)}`]) {
      await on(`?${CHECKOUT}&${address}`, async (page) => {
        await page.waitForSelector(".toolbar");
        await page.keyboard.press("?");
        await page.getByRole("dialog", { name: "Keys" }).waitFor();
        await page.keyboard.press("Escape");
        await page.getByText("The pattern takes longer than 5 seconds").waitFor();
        await drawn(page, "main");
        await matchersEnd(page);
        await page.goto(new URL(`?${CHECKOUT}&${address}`, page.url()).href);
        await page.waitForSelector(".toolbar");
        // A new pattern does not wait for the end of the former one.
        await page.keyboard.press("/");
        await page.keyboard.type("malloc");
        if (address.startsWith("only")) await page.getByRole("button", { name: /^Remove the filter/ }).click();
        await page.waitForFunction(() => document.querySelectorAll("g.frame.match").length > 0);
        assert.ok(!(await page.textContent(".results")).includes("takes longer"));
        await matchersEnd(page);
      });
    }
  });

  it("by span or trace keeps only their samples, in graph, table and comparison", async () => {
    const [trace, pay] = ["4bf92f3577b34da6a3ce929d0e0e4736", "53995c3f42cd8ad8"];
    const [price, send] = ["shop::checkout::price_basket", "__libc_write"];
    await on(`?${CHECKOUT}`, async (page) => {
      await drawn(page, send);
      const all = await stacks(page);
      const of = (...names) => sum(all.filter(({ stack }) => stack.some(({ name }) => names.includes(name))));
      await page.keyboard.press("f");
      await page.fill("#filter-spans", ` ${pay} `);
      // The driver lists the frames before it reads them, so a redraw in between would mix two graphs.
      const complete = (total) => page.waitForFunction((total) => document.querySelector("g.frame")?.__data__.data.total === total && document.querySelector(".flame-graph[aria-busy=false]"), total);
      await complete(of("shop::checkout::pay"));
      assert.equal(new URL(page.url()).searchParams.get("span_id"), pay);
      const totals = await totalsOf(page);
      assert.deepEqual([totals[price], totals[send]], [undefined, undefined]);
      await accessible(page);
      // An id of a trace, in the letters of another tool.
      await page.fill("#filter-spans", trace.toUpperCase());
      await complete(of("shop::checkout::pay", price));
      assert.equal(new URL(page.url()).searchParams.get("trace_id"), trace.toUpperCase());
      await page.getByRole("button", { name: "Table", exact: true }).click();
      await page.waitForSelector("table.top tbody tr");
      const rows = await page.$$eval("table.top tbody th", (cells) => cells.map((cell) => cell.textContent));
      assert.ok(rows.includes(price) && rows.includes("SSL_write") && !rows.includes(send), `${rows}`);
      await page.getByRole("button", { name: /^Remove the filter: only trace/ }).click();
      await page.locator("table.top tbody th", { hasText: send }).waitFor();
    });
    // A link with both, as a tool for traces may make it: the span is the smaller one.
    await on(`?${CHECKOUT}&compare=1&trace_id=${trace}&span_id=${pay}`, async (page) => {
      await drawn(page, "SSL_write");
      const frames = await framesOf(page);
      assert.deepEqual(frames.filter(({ name }) => [price, send].includes(name)), []);
    });
  });

  it("by span applies to the plot, the heat map, the list and the downloads", async () => {
    const pay = "53995c3f42cd8ad8";
    /** Opens a view, and returns the answer to the request of the page for this path. */
    const answerOf = async (page, path, address) => {
      const answer = page.waitForResponse((response) => new URL(response.url()).pathname.endsWith(`/api/v1/${path}`));
      await page.goto(new URL(address, page.url()).href);
      return answer;
    };
    const total = (numbers) => numbers.reduce((all, number) => all + (number ?? 0), 0);
    await on(`?${CHECKOUT}`, async (page) => {
      await drawn(page, "SSL_write");
      const plotted = async () => (await page.textContent(".timeline.main .reading")).trim();
      const [whole, all] = [await plotted(), sum((await stacks(page)).filter(({ stack }) => stack.some(({ name }) => name === "shop::checkout::pay")))];
      const { points } = await (await answerOf(page, "timeline", `?${CHECKOUT}&span_id=${pay}`)).json();
      assert.equal(total(points.map(({ value }) => value)), all);
      await page.waitForFunction((whole) => /peak/.test(document.querySelector(".timeline.main .reading")?.textContent) && document.querySelector(".timeline.main .reading").textContent.trim() !== whole, whole);
      const download = page.getByRole("link", { name: "Download pprof" });
      const size = (link) => page.evaluate(async (link) => (await (await fetch(link)).arrayBuffer()).byteLength, link);
      const link = await download.getAttribute("href");
      assert.match(link, new RegExp(`span_id=${pay}`));
      assert.ok((await size(link)) < (await size(link.replace(`&span_id=${pay}`, ""))));
      const { rows } = await (await answerOf(page, "heatmap", `?${CHECKOUT}&span_id=${pay}&time=heat&rows=service_name`)).json();
      assert.equal(total(rows.flatMap(({ cells }) => cells)), all);
      const list = (await answerOf(page, "profiles", `?${CHECKOUT}&span_id=${pay}&show=list`)).url();
      const { profiles } = await page.evaluate(async (list) => (await fetch(list)).json(), list.replace("limit=100", "limit=10000"));
      // The seed samples 99 times a second.
      assert.equal(total(profiles.map(({ samples }) => samples)) * Math.floor(1e9 / 99), all);
      await page.waitForSelector("table.list tbody tr");
      assert.match(await page.getByRole("link", { name: /^Download profile/ }).first().getAttribute("href"), new RegExp(`\\?span_id=${pay}`));
      await accessible(page);
      await page.getByRole("button", { name: /^Remove the filter: only span/ }).click();
      await page.waitForFunction(() => !location.search.includes("span_id"));
    });
    await on(`?${CHECKOUT}&show=list&only=pay&span_id=${"0".repeat(16)}`, async (page) => {
      await page.getByText("No profile has such a sample").waitFor();
      assert.equal(await page.getByRole("button", { name: /^Remove the filter/ }).count(), 1);
      assert.ok(await page.getByRole("button", { name: "Download pprof" }).isDisabled());
    });
  });

  it("by span says what is wrong with an id, or that no sample has it", async () => {
    const wrong = [["4bf9", /“4bf9” is no id\. A span has 16 hex digits, a trace 32/], [",", /“,” is no id/], [`${"0".repeat(16)},${"0".repeat(32)}`, /ids of spans or ids of traces, not both/]];
    for (const [ids, message] of wrong) {
      await on(`?${CHECKOUT}&span_id=${ids}`, async (page) => {
        await drawn(page, "__libc_write");
        assert.match(await page.textContent(".numbers [role=alert]"), message);
        await page.keyboard.press("f");
        assert.match(await page.textContent("#filter-spans-error"), message);
      });
    }
    await on(`?${CHECKOUT}&span_id=${"0".repeat(16)}`, async (page) => {
      await page.getByText("No stack passes the filters").waitFor();
      await page.getByText("only if its program publishes spans").waitFor();
      await accessible(page);
      await page.getByRole("button", { name: "Remove all filters" }).click();
      await drawn(page, "__libc_write");
    });
    // Without the span there are no profiles either.
    await on(`?q=${encodeURIComponent('{service_name="nobody"}')}&span_id=${"0".repeat(16)}`, async (page) => {
      await page.getByText("No profiles in this selection").waitFor();
    });
  });

  it("that no stack passes can be removed", async () => {
    await on(`?${CHECKOUT}&only=nothing_of_this_name`, async (page) => {
      await page.getByText("No stack passes the filters").waitFor();
      await page.locator(".empty").getByRole("button", { name: "Remove all filters" }).click();
      await drawn(page, "main");
      assert.ok(!page.url().includes("only="));
    });
  });

  it("applies to the sandwich view", async () => {
    await on(`?${CHECKOUT}&show=sandwich&function=shop%3A%3Acheckout%3A%3Aprice_basket&without=malloc`, async (page) => {
      await page.waitForSelector(".flame.callees g.frame");
      const kept = (await stacks(page)).filter(({ stack }) => stack.some(({ name }) => name.endsWith("price_basket")) && !stack.some(({ name }) => name.includes("malloc")));
      assert.equal(await page.$$eval(".flame.callees g.frame", (groups) => groups.find(({ __data__: { depth } }) => depth === 0).__data__.data.total), sum(kept));
    });
  });
});

describe("names that are still missing", () => {
  it("have a note beside the total, until the collector has them", async () => {
    await on(`?${CHECKOUT}`, async (page) => {
      const note = page.getByText("names are missing: the collector still reads debug information");
      await drawn(page, "main");
      assert.equal(await note.count(), 0);
      // The collector of the tests has all names, so the answer is changed on its way.
      await page.route("**/api/v1/flamegraph?*", async (route) => {
        const response = await route.fetch();
        await route.fulfill({ response, json: { ...(await response.json()), names_incomplete: true } });
      });
      await page.reload();
      await note.waitFor();
      await accessible(page);
      await page.unroute("**/api/v1/flamegraph?*");
      await page.reload();
      await drawn(page, "main");
      assert.equal(await note.count(), 0);
    });
  });
});

describe("colours", () => {
  it("by library have one hue for each mapped file", async () => {
    await on(`?${CHECKOUT}`, async (page) => {
      await drawn(page, "main");
      await page.getByRole("button", { name: "Options of the graph" }).click();
      await page.getByRole("button", { name: "Library" }).click();
      await page.waitForFunction(() => location.search.includes("colour=binary") && document.querySelector(".legend")?.textContent.includes("libcrypto.so.3"));
      const frames = await framesOf(page);
      const near = (a, b) => Math.min((360 + hueOf(a) - hueOf(b)) % 360, (360 + hueOf(b) - hueOf(a)) % 360);
      const fill = (name) => named(frames, name).fill;
      assert.ok(near(fill("SSL_write"), fill("aes_gcm_enc_update")) <= 24);
      for (const other of ["__libc_write", "main", "tcp_sendmsg"]) assert.ok(near(fill("SSL_write"), fill(other)) > 12, other);
      // Packages of one program have one hue, and by package they do not.
      const [own, bundled] = ["shop::checkout::place_order", "serde_json::de::from_slice"];
      assert.ok(near(fill(own), fill(bundled)) <= 24);
      await page.getByRole("button", { name: "Package" }).click();
      await page.waitForFunction(() => !location.search.includes("colour="));
      const packages = await framesOf(page);
      assert.ok(near(named(packages, own).fill, named(packages, bundled).fill) > 24);
    });
  });
});

describe("the help for keys", () => {
  it("opens by ? and closes by Escape, and typing ? in a field does not open it", async () => {
    for (const colorScheme of ["light", "dark"]) {
      await on(`?${CHECKOUT}`, async (page) => {
        await drawn(page, "main");
        await page.keyboard.press("?");
        const help = page.getByRole("dialog", { name: "Keys" });
        await help.waitFor();
        for (const word of ["search functions", "callers and callees", "pick a range"]) assert.ok((await help.textContent()).includes(word), word);
        await accessible(page);
        // The keys of the page do nothing behind the help.
        await page.keyboard.press("f");
        await page.keyboard.press("Escape");
        await help.waitFor({ state: "hidden" });
        assert.equal(await page.locator(".filters-box").count(), 0);
        await page.keyboard.press("/");
        await page.keyboard.press("?");
        assert.equal(await page.inputValue('input[type="search"]'), "?");
        assert.equal(await help.isVisible(), false);
      }, { colorScheme });
    }
  });
});
