// Test of `gannet-collector open`: the page of one file.
import assert from "node:assert/strict";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { it } from "node:test";
import { openFile, openPage } from "./collector.mjs";
import { CHECKOUT, drawn, withPage } from "./page.mjs";

const { tested } = withPage();

it("shows the functions of a file as the collector shows them", async () => {
  const directory = await mkdtemp(join(tmpdir(), "gannet-open-"));
  try {
    const { address } = tested.collector;
    const until = Date.now();
    const query = `query=${encodeURIComponent('{service_name="checkout"}')}&from=${until - 3600e3}&until=${until}&type=cpu/nanoseconds`;
    const file = join(directory, "checkout.pb.gz");
    await writeFile(file, Buffer.from(await (await fetch(`${address}api/v1/merge?${query}`)).arrayBuffer()));

    const opened = await openFile(file);
    const shapes = [];
    for (const link of [`${address}?${CHECKOUT}&from=${until - 3600e3}&until=${until}`, `${opened.link}&type=cpu%2Fnanoseconds`]) {
      const { page, faults, close } = await openPage(tested.browser, link);
      const frames = await drawn(page, "shop::checkout::price_basket");
      shapes.push(frames.map(({ name, width }) => `${name} ${Math.round(width)}`));
      assert.deepEqual(faults, []);
      await close();
    }
    assert.ok(shapes[0].length > 10, shapes[0].join("\n"));
    assert.deepEqual(shapes[1], shapes[0]);
    await opened.stop();
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
});
