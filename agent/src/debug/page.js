'use strict';
const byId = (id) => document.getElementById(id);
const get = async (path) => {
  const answer = await fetch(`${path}?format=json`);
  if (!answer.ok) throw new Error(`${path}: ${await answer.text()}`);
  return answer.json();
};
const fill = (id, rows) => {
  const body = byId(id).tBodies[0];
  body.replaceChildren(...rows.map((cells) => {
    const row = document.createElement('tr');
    for (const cell of cells) {
      const data = document.createElement('td');
      data.textContent = cell;
      if (typeof cell === 'number') data.className = 'n';
      row.append(data);
    }
    return row;
  }));
};
const refresh = async () => {
  const [status, ledger, rules, processes] =
    await Promise.all(['/statusz', '/debug/ledger', '/debug/rules', '/debug/processes'].map(get));
  byId('node').textContent = status.node;
  const collector = status.collector ? `${status.collector} ${status.connected ? '(connected)' : '(not connected)'}` : 'no collector';
  byId('about').textContent = `${status.version}, Linux ${status.kernel}, ${collector}, `
    + `${(status.rss_bytes / 2 ** 20).toFixed(0)} MiB, ${status.cpu_seconds.toFixed(1)} s CPU in ${status.up_seconds} s`;
  const lost = Object.entries(ledger.lost);
  byId('ledger').textContent = `${ledger.taken} taken = ${ledger.delivered} delivered + ${ledger.pending} pending + `
    + `${lost.reduce((sum, [, n]) => sum + n, 0)} lost${lost.length ? ` (${lost.map(([why, n]) => `${why} ${n}`).join(', ')})` : ''} + ${ledger.unaccounted} unaccounted`;
  fill('rules', rules.map((r) => [r.id, r.state, r.processes, r.samples, r.reason]));
  fill('processes', processes.slice(0, 200).map((p) =>
    [p.key, p.comm, p.unit || p.container_id.slice(0, 12) || p.exe, p.samples, p.stacks, p.state, p.rules.join(', ')]));
  const trouble = byId('trouble');
  trouble.hidden = status.degraded.length === 0;
  trouble.textContent = status.degraded.join('; ');
  const graph = await fetch('/debug/flame');
  byId('empty').hidden = graph.ok;
  byId('flame').hidden = !graph.ok;
  // Redrawn only while the user does not use it.
  if (graph.ok && document.activeElement !== byId('flame')) byId('flame').src = `/debug/flame#${Date.now()}`;
};
const loop = async () => {
  if (byId('live').checked) {
    try {
      await refresh();
    } catch (error) {
      byId('trouble').hidden = false;
      byId('trouble').textContent = `The agent does not answer: ${error.message}`;
    }
  }
  setTimeout(loop, 5000);
};
loop();
