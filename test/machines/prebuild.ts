import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { Problem } from './command.ts';
import { clone } from './root.ts';

/** The addon for a machine of another architecture, if it is older than its sources. */
export function prebuild(arch: 'arm64'): void {
  const args = [join(clone, 'scripts/prebuilds.mjs'), `--arch=${arch}`, '--outdated'];
  if (spawnSync(process.execPath, args, { stdio: 'inherit' }).status !== 0)
    throw new Problem(`the addon for ${arch} could not be built`);
}
