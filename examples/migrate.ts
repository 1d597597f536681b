// A guest moves to another process while it runs: first all of its memory, then what it wrote meanwhile, and at the end a short pause. With --post-copy it
// moves at once, and its pages come when it touches them. `node dist/examples/migrate.js [--backend software] [--post-copy]`
import { fork } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import net from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { GuestAgent, Kvm, MiB, receiveMemory, sendMemory, servePages } from 'guest-memfd';

const SIZE = 32 * MiB;
const COUNTER = 20 * MiB;
const backend = process.argv.includes('software') ? 'software' : 'auto';
const postCopy = process.argv.includes('--post-copy');
const mib = (bytes: number): string => `${(bytes / MiB).toFixed(2)} MiB`;
const counter = (bytes: Uint8Array): bigint => new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true);

/** The guest counts, in its own memory. */
function count(agent: GuestAgent): bigint {
  const before = counter(agent.read(COUNTER, 8));
  return agent.compareAndSwap(COUNTER, before, before + 1n) + 1n;
}

async function source(folder: string): Promise<void> {
  using kvm = Kvm.open({ backend });
  using vm = kvm.createVm();
  vm.createMemslot({ address: 0, size: SIZE, hostMemory: kvm.createHostMemory({ size: SIZE, kind: 'memfd' }) });
  const noise = Buffer.alloc(MiB, 'some memory that a guest has ');
  for (let at = MiB; at < 16 * MiB; at += MiB) vm.memory.write(at, noise);
  const agent = GuestAgent.boot(vm, { address: 0 });
  let last = count(agent);

  const pages = net.createServer((stream) => servePages(vm, stream).then(() => stream.end()));
  pages.listen(join(folder, 'pages'));
  const stream = net.connect(join(folder, 'migration'));
  const { rounds, missingBytes, pausedMilliseconds } = await sendMemory(vm, stream, {
    postCopy,
    rounds: postCopy ? 0 : 6,
    enough: 64 * 1024,
    // The guest runs on between the pieces, until the last round.
    onProgress: ({ round, paused }) => {
      if (round < 3 && !paused) last = count(agent);
    },
    prepare: () => {
      console.log(`source       stops the guest, which has counted to ${last}`);
      agent.close();
      return Buffer.from(String(last));
    },
  });
  console.log(`source       sent ${rounds.map(mib).join(', then ')}${postCopy ? `; left ${mib(missingBytes)}` : ''}`);
  console.log(`source       the pause was ${pausedMilliseconds.toFixed(1)} ms`);
  stream.end();
  // Until the other side has all of it.
  if (missingBytes > 0) await new Promise((resolve) => process.once('message', resolve));
  pages.close();
}

async function destination(): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), 'migrate-'));
  const server = net.createServer().listen(join(folder, 'migration'));
  await once(server, 'listening');
  const child = fork(process.argv[1] as string, ['source', folder, ...process.argv.slice(2)]);
  const exited = once(child, 'exit');
  const [stream] = (await once(server, 'connection')) as [net.Socket];
  using kvm = Kvm.open({ backend });
  console.log(
    `destination  ${kvm.backend}, Linux ${kvm.kernelRelease}, process ${process.pid}; source is ${child.pid}`,
  );
  const { vm, data, pagers } = await receiveMemory(kvm, stream, { pages: { path: join(folder, 'pages') } });
  const agent = GuestAgent.boot(vm, { address: 0 });
  const found = counter(agent.read(COUNTER, 8));
  console.log(
    `destination  the guest goes on from ${found} (${found === BigInt(Buffer.from(data).toString()) ? 'as it was told' : 'LOST'})`,
  );
  console.log(`destination  and counts to ${count(agent)}`);
  for (const pager of pagers) {
    await pager.done;
    const { totalBytes, faults } = pager.progress;
    console.log(`destination  ${mib(totalBytes)} came behind it; the guest had to wait ${faults} times`);
  }
  if (pagers.length > 0) child.send('done');
  agent.close();
  await exited;
  stream.destroy();
  server.close();
  rmSync(folder, { recursive: true });
}

if (process.argv[2] === 'source') await source(process.argv[3] as string);
else await destination();
