import { existsSync, readFileSync, readdirSync } from "node:fs";
import { dirname, join } from "node:path";
import { defineConfig, type Plugin } from "vite";

/** Writes `third-party.txt` with the names and licences of all bundled packages. */
function notices(): Plugin {
  const allowed = new Set(["Apache-2.0", "MIT", "ISC", "BSD-2-Clause", "BSD-3-Clause", "0BSD"]);
  return {
    name: "notices",
    generateBundle(_options, bundle) {
      const roots = new Set<string>();
      for (const chunk of Object.values(bundle)) {
        if (chunk.type !== "chunk") continue;
        for (const id of chunk.moduleIds) {
          let dir = dirname(id);
          if (!dir.includes("node_modules")) continue;
          // A package.json in a subdirectory may only set the module type; the one of the package has a version.
          while (!existsSync(join(dir, "package.json")) || !JSON.parse(readFileSync(join(dir, "package.json"), "utf8")).version) {
            dir = dirname(dir);
          }
          roots.add(dir);
        }
      }
      const entries = [...roots].map((dir) => {
        const { name, version, license, homepage } = JSON.parse(readFileSync(join(dir, "package.json"), "utf8"));
        if (!allowed.has(license)) throw new Error(`${name} ${version} has the licence ${license}, which is not allowed`);
        const file = readdirSync(dir).find((entry) => /^licen[cs]e/i.test(entry));
        if (!file) throw new Error(`${name} ${version} has no licence text`);
        return `${name} ${version} (${license})\n${homepage ?? ""}\n\n${readFileSync(join(dir, file), "utf8").trim()}\n`;
      });
      const rule = `\n${"-".repeat(78)}\n\n`;
      this.emitFile({
        type: "asset",
        fileName: "third-party.txt",
        source: ["The page of the Gannet collector contains these packages.\n", ...entries.sort()].join(rule),
      });
    },
  };
}

export default defineConfig({
  // Relative addresses, so that the page also works below a path, for instance behind `kubectl proxy`.
  base: "./",
  plugins: [notices()],
  build: {
    target: "es2022",
    sourcemap: false,
    // The content security policy does not allow data: URLs.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    reportCompressedSize: false,
  },
  server: { proxy: { "/api": process.env.GANNET_HTTP ?? "http://127.0.0.1:4180" } },
});
