import { mkdirSync } from 'node:fs';
import { homedir } from 'node:os';
import { join } from 'node:path';

/** Outside the clone, so that clones share it and `git clean` leaves it. Everything in it can be made again. */
export const cache = join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'guest-memfd/machines');

export function cacheFolder(...names: readonly string[]): string {
  const folder = join(cache, ...names);
  mkdirSync(folder, { recursive: true });
  return folder;
}
